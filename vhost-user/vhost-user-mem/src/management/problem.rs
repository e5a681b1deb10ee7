//! Answers that are errors.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use management_api::{PROBLEM_JSON, Problem};
use tokio::task::JoinError;

/// Why the device did not do something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status.
    pub status: u16,
    /// The kind of problem in a few words.
    pub title: String,
    /// What was wrong this time, in a sentence.
    pub detail: String,
}

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorAnswer {
    /// Its body.
    pub(super) problem: Problem,
    /// Whether the connection is of no use after this answer.
    close: bool,
}

impl ErrorAnswer {
    /// A problem whose kind is the status.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        let title = status.canonical_reason().unwrap_or("Error");
        Self { problem: Problem::new(status.as_u16(), title, detail), close: false }
    }

    /// A call to the device did not come to its end.
    pub(super) fn of_failed_call(error: JoinError) -> Self {
        tracing::error!(%error, "a management call failed");
        let detail = "The device failed to carry out the request.";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, detail)
    }

    /// Has the connection closed after the answer, since the rest of a request is outstanding.
    pub(super) fn closing(self) -> Self {
        Self { close: true, ..self }
    }
}

impl From<Refusal> for ErrorAnswer {
    fn from(Refusal { status, title, detail }: Refusal) -> Self {
        // A status that is not an error would hide the refusal.
        let status = if (400..600).contains(&status) { status } else { 500 };
        Self { problem: Problem::new(status, title, detail), close: false }
    }
}

impl IntoResponse for ErrorAnswer {
    fn into_response(self) -> Response {
        let Self { problem, close } = self;
        let status =
            StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&problem).unwrap_or_default();
        let mut response = (status, [(header::CONTENT_TYPE, PROBLEM_JSON)], body).into_response();
        if close {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
        }
        response
    }
}
