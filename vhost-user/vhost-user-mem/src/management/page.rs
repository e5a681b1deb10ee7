//! The page at `/`: the device to look at in a browser.
//!
//! One document with everything in it. `vmemctl ui` brings it to a browser; it asks this API for what it
//! shows, and changes nothing.

use std::fmt::Write;
use std::sync::LazyLock;

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::ErrorAnswer;

const FRAME: &str = include_str!("page/page.html");
const STYLE: &str = include_str!("page/page.css");
const SCRIPT: &str = concat!(
    include_str!("page/words.js"),
    include_str!("page/api.js"),
    include_str!("page/map.js"),
    include_str!("page/chart.js"),
    include_str!("page/main.js"),
);

/// The page, but for what differs each time.
static PAGE: LazyLock<String> =
    LazyLock::new(|| FRAME.replace("{{style}}", STYLE).replace("{{script}}", SCRIPT));

/// The page.
pub(super) fn answer() -> Result<Response, ErrorAnswer> {
    let nonce = nonce().map_err(|error| {
        let detail = format!("The system has no random bytes for the page: {error}.");
        ErrorAnswer::new(StatusCode::INTERNAL_SERVER_ERROR, detail)
    })?;
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; \
         img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
         require-trusted-types-for 'script'; trusted-types 'none'"
    );
    let policy = HeaderValue::from_str(&policy)
        .map_err(|error| ErrorAnswer::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    let fixed = |name: HeaderName, value| (name, HeaderValue::from_static(value));
    let head = HeaderMap::from_iter([
        (header::CONTENT_SECURITY_POLICY, policy),
        fixed(header::CONTENT_TYPE, "text/html; charset=utf-8"),
        fixed(header::CACHE_CONTROL, "no-store"),
        fixed(header::REFERRER_POLICY, "no-referrer"),
        fixed(header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        fixed(HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        fixed(HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ]);
    Ok((head, PAGE.replace("{{nonce}}", &nonce)).into_response())
}

/// What tells the page's own style and script from any other, hexadecimal.
fn nonce() -> rustix::io::Result<String> {
    let mut bytes = [0; 16];
    // So few bytes come whole, or not at all.
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    }))
}
