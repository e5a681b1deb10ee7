//! The OpenAPI document.

use management_api::{
    Blocks, DeviceInfo, LogLevel, MigrationSetting, Problem, Range, RequestedSize, Resident,
    Resize, Swept,
};
use utoipa::{OpenApi, ToResponse};

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
