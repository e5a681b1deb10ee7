//! Errors as RFC 9457 problem details.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use tokio::task::JoinError;
use utoipa::ToSchema;

/// Media type of a [`Problem`].
pub(super) const PROBLEM_JSON: &str = "application/problem+json";

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

/// Body of every answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Always `about:blank`: status and title say what kind of problem it is.
    #[serde(rename = "type", default = "about_blank")]
    #[schema(required)]
    pub problem_type: String,
    /// The kind of problem in a few words.
    pub title: String,
    /// The HTTP status again.
    #[schema(minimum = 400, maximum = 599)]
    pub status: u16,
    /// What was wrong this time, in a sentence.
    pub detail: String,
    /// Whether the connection is of no use after this answer.
    #[serde(skip)]
    pub(super) close: bool,
}

fn about_blank() -> String {
    "about:blank".to_owned()
}

impl Problem {
    /// A problem whose kind is the status.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        let title = status.canonical_reason().unwrap_or("Error").to_owned();
        let detail = detail.into();
        Self { problem_type: about_blank(), title, status: status.as_u16(), detail, close: false }
    }

    /// A call to the device did not come to its end.
    pub(super) fn of_failed_call(error: JoinError) -> Self {
        tracing::error!(%error, "a management call failed");
        let detail = "The device failed to carry out the request.";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, detail)
    }

    /// Has the connection closed after the answer, since the rest of a request is still to come.
    pub(super) fn closing(self) -> Self {
        Self { close: true, ..self }
    }
}

impl From<Refusal> for Problem {
    fn from(Refusal { status, title, detail }: Refusal) -> Self {
        // A status that is no error would hide the refusal.
        let status = if (400..600).contains(&status) { status } else { 500 };
        Self { problem_type: about_blank(), title, status, detail, close: false }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&self).unwrap_or_default();
        let mut response = (status, [(header::CONTENT_TYPE, PROBLEM_JSON)], body).into_response();
        if self.close {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
        }
        response
    }
}
