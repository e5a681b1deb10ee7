//! Request bodies: bounded in size and time, and refused with a reason.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::error::Category;

use super::ErrorAnswer;

/// Far more than any request needs.
pub(super) const LIMIT: usize = 64 << 10;

/// From the head of a request to the end of its body.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Reads the whole body.
pub(super) async fn read(headers: &HeaderMap, body: Body) -> Result<Bytes, ErrorAnswer> {
    let too_large = || {
        let detail = format!("The body is larger than the {LIMIT} bytes that are allowed.");
        ErrorAnswer::new(StatusCode::PAYLOAD_TOO_LARGE, detail).closing()
    };
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > LIMIT as u64) {
        return Err(too_large());
    }
    match tokio::time::timeout(TIMEOUT, Limited::new(body, LIMIT).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => {
            let detail = format!("The body cannot be read: {error}.");
            Err(ErrorAnswer::new(StatusCode::BAD_REQUEST, detail).closing())
        }
        Err(_) => {
            let detail = format!("The body did not arrive within {} s.", TIMEOUT.as_secs());
            Err(ErrorAnswer::new(StatusCode::REQUEST_TIMEOUT, detail).closing())
        }
    }
}

/// Reads a JSON object; `expected` says what it is to be like.
pub(super) async fn json<T: DeserializeOwned>(
    headers: &HeaderMap,
    body: Body,
    expected: &str,
) -> Result<T, ErrorAnswer> {
    check_content_type(headers)?;
    let body = read(headers, body).await?;
    parse(&body, expected)
}

/// Reads a body that says nothing: none, or an empty object.
pub(super) async fn empty(headers: &HeaderMap, body: Body) -> Result<(), ErrorAnswer> {
    let body = read(headers, body).await?;
    if body.is_empty() {
        return Ok(());
    }
    check_content_type(headers)?;
    let fields: serde_json::Map<String, serde_json::Value> = parse(&body, "no body")?;
    match fields.keys().next() {
        None => Ok(()),
        Some(field) => Err(ErrorAnswer::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            format!("The body is wrong: unknown field `{field}`; expected no body."),
        )),
    }
}

fn check_content_type(headers: &HeaderMap) -> Result<(), ErrorAnswer> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let value = String::from_utf8_lossy(value.as_bytes());
    let essence = value.split(';').next().unwrap_or_default().trim();
    // The second is what curl calls any body unless told otherwise; it is read as JSON all the
    // same, and refused as that if it is none.
    let known = ["application/json", "application/x-www-form-urlencoded"];
    if known.iter().any(|known| essence.eq_ignore_ascii_case(known)) {
        return Ok(());
    }
    let detail = format!("The content type is {essence:?}, but must be application/json.");
    Err(ErrorAnswer::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail))
}

/// Malformed JSON is 400; JSON that means nothing here is 422.
fn parse<T: DeserializeOwned>(body: &[u8], expected: &str) -> Result<T, ErrorAnswer> {
    let malformed = |reason: String| {
        let detail = format!("The body is not JSON: {reason}; expected {expected}.");
        ErrorAnswer::new(StatusCode::BAD_REQUEST, detail)
    };
    let wrong = |reason: String| {
        let detail = format!("The body is wrong: {reason}; expected {expected}.");
        ErrorAnswer::new(StatusCode::UNPROCESSABLE_ENTITY, detail)
    };
    if body.is_empty() {
        return Err(malformed("it is empty".to_owned()));
    }
    let text = str::from_utf8(body).map_err(|error| malformed(error.to_string()))?;
    serde_json::from_str::<IgnoredAny>(text).map_err(|error| malformed(error.to_string()))?;
    // Serde would take an array for a structure.
    if !text.trim_start().starts_with('{') {
        return Err(wrong("it is not an object".to_owned()));
    }
    serde_json::from_str(text).map_err(|error| match error.classify() {
        Category::Data => wrong(error.to_string()),
        _ => malformed(error.to_string()),
    })
}
