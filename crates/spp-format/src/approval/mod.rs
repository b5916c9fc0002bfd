//! Protected actions, which several officers must approve, and the statements that officers sign.

mod action;
mod action_kind;
mod quota;
mod request_id;
mod rules;
mod statement;

pub use action::{MAX_CEREMONY_LEN, MAX_REASON_LEN, ProtectedAction};
pub use action_kind::ProtectedActionKind;
pub use quota::Quota;
pub use request_id::RequestId;
pub use rules::ApprovalRules;
pub use statement::{ApprovalStatement, SignedStatement, Verdict, verify as verify_statement};
