//! The OpenAPI document.

use management_api::{
    Blocks, DeviceInfo, LogLevel, MigrationSetting, Problem, Range, RequestedSize, Resident,
    Resize, Swept,
};
use utoipa::{IntoResponses, OpenApi, ToResponse};

use super::router;

/// The API described in OpenAPI.
pub fn openapi() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "vhost-user-mem management API",
        description = "Resizes and observes one virtio-mem device. Served on a Unix socket.",
    ),
    paths(
        router::show,
        router::device,
        router::set_requested_size,
        router::blocks,
        router::resident,
        router::system_reset,
        router::sweep,
        router::set_migration,
        router::set_log_level,
        router::events,
        router::metrics,
        router::document,
    ),
    components(
        schemas(
            Blocks,
            DeviceInfo,
            LogLevel,
            MigrationSetting,
            Resident,
            Problem,
            Range,
            RequestedSize,
            Resize,
            Swept
        ),
        responses(Busy, Failure, Malformed, TooLarge, TooSlow, Wrong, WrongType),
    )
)]
struct Document;

/// What any request may be answered with, beside its own answers.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "describes answers")]
pub(super) enum WithoutBody {
    #[response(status = 500)]
    Failure(#[ref_response] Failure),
    #[response(status = 503)]
    Busy(#[ref_response] Busy),
}

/// What a request that changes something may be answered with, beside its own answers.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "describes answers")]
pub(super) enum WithBody {
    #[response(status = 400)]
    Malformed(#[ref_response] Malformed),
    #[response(status = 408)]
    TooSlow(#[ref_response] TooSlow),
    #[response(status = 413)]
    TooLarge(#[ref_response] TooLarge),
    #[response(status = 415)]
    WrongType(#[ref_response] WrongType),
    #[response(status = 422)]
    Wrong(#[ref_response] Wrong),
    #[response(status = 500)]
    Failure(#[ref_response] Failure),
    #[response(status = 503)]
    Busy(#[ref_response] Busy),
}

/// The body is not JSON
#[derive(ToResponse)]
#[response(content_type = "application/problem+json")]
pub(super) struct Malformed(#[expect(dead_code, reason = "describes the body")] Problem);

/// The body did not arrive in time
#[derive(ToResponse)]
#[response(content_type = "application/problem+json")]
pub(super) struct TooSlow(#[expect(dead_code, reason = "describes the body")] Problem);

/// The body is larger than 64 KiB
#[derive(ToResponse)]
#[response(content_type = "application/problem+json")]
pub(super) struct TooLarge(#[expect(dead_code, reason = "describes the body")] Problem);

/// The content type is not application/json
#[derive(ToResponse)]
#[response(content_type = "application/problem+json")]
pub(super) struct WrongType(#[expect(dead_code, reason = "describes the body")] Problem);

/// The body is not what is asked for, or breaks a rule of the device; nothing has changed
#[derive(ToResponse)]
#[response(content_type = "application/problem+json")]
pub(super) struct Wrong(#[expect(dead_code, reason = "describes the body")] Problem);

/// The device failed
#[derive(ToResponse)]
#[response(content_type = "application/problem+json")]
pub(super) struct Failure(#[expect(dead_code, reason = "describes the body")] Problem);

/// Too many clients at a time
#[derive(ToResponse)]
#[response(content_type = "application/problem+json")]
pub(super) struct Busy(#[expect(dead_code, reason = "describes the body")] Problem);

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// The answers with an error of an operation, as the document has them.
    fn errors(document: &Value, path: &str, method: &str) -> Vec<String> {
        let answers = document["paths"][path][method]["responses"].as_object().unwrap();
        let errors = answers.iter().filter(|(status, _)| !status.starts_with('2'));
        errors.map(|(status, answer)| format!("{status} {}", answer["$ref"])).collect()
    }

    #[test]
    fn each_answer_that_the_document_refers_to_is_in_it() {
        let document = json!(openapi());
        let named = |names: &[(u16, &str)]| -> Vec<String> {
            let place = |name| format!("\"#/components/responses/{name}\"");
            names.iter().map(|(status, name)| format!("{status} {}", place(name))).collect()
        };
        let without_body = [(500, "Failure"), (503, "Busy")];
        let with_body = [
            (400, "Malformed"),
            (408, "TooSlow"),
            (413, "TooLarge"),
            (415, "WrongType"),
            (422, "Wrong"),
            (500, "Failure"),
            (503, "Busy"),
        ];
        for path in ["/", "/v1/device", "/v1/device/blocks", "/v1/device/resident", "/metrics"] {
            assert_eq!(errors(&document, path, "get"), named(&without_body), "{path}");
        }
        for path in ["/v1/device/requested-size", "/v1/migration", "/v1/log-level"] {
            assert_eq!(errors(&document, path, "put"), named(&with_body), "{path}");
        }
        for path in ["/v1/device/system-reset", "/v1/device/sweep"] {
            let mut expected = named(&with_body);
            expected.insert(2, "409 null".to_owned());
            assert_eq!(errors(&document, path, "post"), expected, "{path}");
        }
        for (_, name) in with_body {
            let answer = &document["components"]["responses"][name];
            let schema = &answer["content"]["application/problem+json"]["schema"];
            assert_eq!(schema["$ref"], "#/components/schemas/Problem", "{name}: {answer}");
        }
    }
}
