//! The names of the states of a session, and the permitted steps between them.

/// A session state without its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StateName {
    /// See [`SessionState::Reserved`](crate::store::SessionState::Reserved).
    Reserved,
    /// See [`SessionState::Issued`](crate::store::SessionState::Issued).
    Issued,
    /// See [`SessionState::Published`](crate::store::SessionState::Published).
    Published,
    /// See [`SessionState::Erased`](crate::store::SessionState::Erased).
    Erased,
    /// See [`SessionState::Aborted`](crate::store::SessionState::Aborted).
    Aborted,
}

impl StateName {
    /// Reports whether one step may take a session from this state to `to`. All storage engines use this rule.
    pub fn can_advance_to(self, to: Self) -> bool {
        matches!(
            (self, to),
            (Self::Reserved, Self::Issued | Self::Aborted)
                | (Self::Issued, Self::Published | Self::Aborted)
                | (Self::Published, Self::Erased)
        )
    }

    /// The state that usually precedes this one, for error messages.
    pub const fn predecessor(self) -> Self {
        match self {
            Self::Reserved | Self::Issued => Self::Reserved,
            Self::Published | Self::Aborted => Self::Issued,
            Self::Erased => Self::Published,
        }
    }
}
