use super::public::{Site, problem};
use axum::Router;
use axum::http::StatusCode;
use axum::response::Response;
use std::sync::Arc;

pub(super) fn routes() -> Router<Arc<Site>> {
    Router::new()
}
pub(super) async fn nothing_here() -> Response {
    problem(StatusCode::NOT_FOUND, "there is nothing here")
}
