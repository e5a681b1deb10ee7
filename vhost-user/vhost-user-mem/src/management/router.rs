//! The resources of the API.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::sse::{KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Extension, Json, Router};
use management_api::{
    Blocks, DeviceInfo, LogLevel, MigrationSetting, Problem, RequestedSize, Resident, Swept,
};
use tokio::sync::{Semaphore, watch};

use super::audit::Detail;
use super::caller::Caller;
use super::{
    BlockRanges, ErrorAnswer, Management, Refusal, body, event_stream, openapi, page, range_lists,
};

/// Content type of the metrics.
pub const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Readers of events at a time. Less than the connections, so that they cannot lock out others.
const EVENT_READERS: usize = 32;

/// Lists of ranges that are sent at a time: each holds a copy of the block bitmap.
pub(super) const LISTS: usize = 4;

/// Clients that are sent a list, or wait for it. With the readers of events less than the
/// connections, so that they cannot lock out others.
const LIST_CLIENTS: usize = 16;

/// Characters that are logged of a log level.
const LEVEL_TOLD: usize = 100;

/// How long a client waits for one of the places.
const LIST_WAIT: Duration = Duration::from_secs(10);

/// What the handlers need.
#[derive(Clone)]
pub(super) struct Api {
    caller: Caller,
    shutdown: watch::Receiver<bool>,
    readers: Arc<Semaphore>,
    lists: Arc<Semaphore>,
    list_clients: Arc<Semaphore>,
}

impl Api {
    pub(super) fn new(management: Arc<dyn Management>, shutdown: watch::Receiver<bool>) -> Self {
        let places = |places| Arc::new(Semaphore::new(places));
        Self {
            caller: Caller::new(management),
            shutdown,
            readers: places(EVENT_READERS),
            lists: places(LISTS),
            list_clients: places(LIST_CLIENTS),
        }
    }

    /// Waits for a place among the lists that are sent, to be kept until the list is.
    async fn list_place(&self) -> Result<impl Send + 'static + use<>, ErrorAnswer> {
        let busy = |detail| ErrorAnswer::new(StatusCode::SERVICE_UNAVAILABLE, detail);
        let client = Arc::clone(&self.list_clients).try_acquire_owned().map_err(|_| {
            busy(format!("{LIST_CLIENTS} clients read lists of ranges already; try again later."))
        })?;
        let place = Arc::clone(&self.lists).acquire_owned();
        match tokio::time::timeout(LIST_WAIT, place).await {
            Ok(Ok(place)) => Ok((client, place)),
            _ => Err(busy(format!(
                "{LISTS} clients read lists of ranges, and none came to the end within {} s; try \
                 again later.",
                LIST_WAIT.as_secs()
            ))),
        }
    }

    async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn Management) -> T + Send + 'static,
    ) -> Result<T, ErrorAnswer> {
        self.caller.call(call).await.map_err(ErrorAnswer::of_failed_call)
    }

    async fn change(
        &self,
        call: impl FnOnce(&dyn Management) -> Result<DeviceInfo, Refusal> + Send + 'static,
    ) -> Result<Json<DeviceInfo>, ErrorAnswer> {
        Ok(Json(self.call(call).await??))
    }
}

/// All resources, with problem details for whatever is none.
pub(super) fn router(api: Api) -> Router {
    Router::new()
        .route("/", get(show))
        .route("/v1/device", get(device))
        .route("/v1/device/requested-size", put(set_requested_size))
        .route("/v1/device/blocks", get(blocks))
        .route("/v1/device/resident", get(resident))
        .route("/v1/device/system-reset", post(system_reset))
        .route("/v1/device/sweep", post(sweep))
        .route("/v1/migration", put(set_migration))
        .route("/v1/log-level", put(set_log_level))
        .route("/v1/events", get(events))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(document))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(api)
}

/// The page that shows the device in a browser.
///
/// It has all that it needs in it, and reads the resources below. `vmemctl ui` brings it to a browser.
#[utoipa::path(get, path = "/", operation_id = "getPage", responses(
    (status = 200, description = "A document", body = String, content_type = "text/html"),
    openapi::WithoutBody,
))]
pub(super) async fn show() -> Result<Response, ErrorAnswer> {
    page::answer()
}

/// The metrics, with problem details for everything else.
pub(super) fn metrics_router(api: Api) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .fallback(only_metrics)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(api)
}

/// The device.
#[utoipa::path(get, path = "/v1/device", operation_id = "getDevice", responses(
    (status = 200, description = "The device", body = DeviceInfo),
    openapi::WithoutBody,
))]
pub(super) async fn device(State(api): State<Api>) -> Result<Json<DeviceInfo>, ErrorAnswer> {
    Ok(Json(api.call(|management| management.device()).await?))
}

/// Asks the guest to plug this much.
#[utoipa::path(put, path = "/v1/device/requested-size", operation_id = "setRequestedSize",
    request_body = RequestedSize, responses(
    (status = 200, description = "The device after the change", body = DeviceInfo),
    openapi::WithBody,
))]
pub(super) async fn set_requested_size(
    State(api): State<Api>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ErrorAnswer> {
    let expected = r#"{"requested_size": BYTES}"#;
    let RequestedSize { requested_size } = body::json(&headers, body, expected).await?;
    let detail = Extension(Detail(format!("requested_size={requested_size}")));
    let done = api.change(move |management| management.resize(requested_size)).await;
    Ok((detail, done).into_response())
}

/// Which parts of the region are plugged and which are discarded.
///
/// Both lists are of the same moment, which lies after the request came, however long it takes to
/// read them. They are sent as they are read, by a few clients at a time; a client that reads less
/// than 64 KiB a second for longer than 10 s is disconnected.
#[utoipa::path(get, path = "/v1/device/blocks", operation_id = "getBlocks", responses(
    (status = 200, description = "The whole region", body = Blocks),
    openapi::WithoutBody,
))]
pub(super) async fn blocks(State(api): State<Api>) -> Result<Response, ErrorAnswer> {
    let place = api.list_place().await?;
    let BlockRanges { plugged, discarded } = api.call(|management| management.blocks()).await?;
    let fields = vec![("plugged", Some(plugged)), ("discarded", Some(discarded))];
    range_lists::answer(fields, place).await
}

/// In which parts of the region the host holds memory.
///
/// Of memory of huge pages, that is what is plugged: it is taken as a whole. Elsewhere a block that
/// is discarded may hold memory, too, where the guest touched what it may not use. The guest may use
/// memory while it is looked up: each range was resident at a moment after the request came.
#[utoipa::path(get, path = "/v1/device/resident", operation_id = "getResident", responses(
    (status = 200, description = "What the host holds", body = Resident),
    openapi::WithoutBody,
))]
pub(super) async fn resident(State(api): State<Api>) -> Result<Response, ErrorAnswer> {
    let place = api.list_place().await?;
    let resident = api.call(|management| management.resident()).await?;
    range_lists::answer(vec![("resident", resident)], place).await
}

/// Unplugs and discards everything, as a reset of the virtual machine does.
#[utoipa::path(post, path = "/v1/device/system-reset", operation_id = "systemReset", responses(
    (status = 200, description = "The device after the reset", body = DeviceInfo),
    (status = 409, description = "Memory cannot be discarded now", body = Problem,
        content_type = "application/problem+json"),
    openapi::WithBody,
))]
pub(super) async fn system_reset(
    State(api): State<Api>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<DeviceInfo>, ErrorAnswer> {
    body::empty(&headers, body).await?;
    api.change(|management| management.system_reset()).await
}

/// Discards what the guest has in memory that it has not plugged, and tells how much that was.
///
/// What is plugged is not touched, also where it is plugged meanwhile.
#[utoipa::path(post, path = "/v1/device/sweep", operation_id = "sweep", responses(
    (status = 200, description = "What was discarded", body = Swept),
    (status = 409, description = "The guest does not run, or migration is active", body = Problem,
        content_type = "application/problem+json"),
    openapi::WithBody,
))]
pub(super) async fn sweep(
    State(api): State<Api>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Swept>, ErrorAnswer> {
    body::empty(&headers, body).await?;
    Ok(Json(api.call(|management| management.sweep()).await??))
}

/// Starts or ends migration: block state is frozen while it is active.
///
/// 500 when that cannot be saved. Nothing has changed then if it was to start; if it was to end, it
/// has ended, but a daemon that is started again may take it for active: the same request again
/// tries again to save it.
#[utoipa::path(put, path = "/v1/migration", operation_id = "setMigration",
    request_body = MigrationSetting, responses(
    (status = 200, description = "The device after the change", body = DeviceInfo),
    openapi::WithBody,
))]
pub(super) async fn set_migration(
    State(api): State<Api>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ErrorAnswer> {
    let expected = r#"{"active": true} or {"active": false}"#;
    let MigrationSetting { active } = body::json(&headers, body, expected).await?;
    let detail = Extension(Detail(format!("active={active}")));
    let done = api.change(move |management| management.set_migration(active)).await;
    Ok((detail, done).into_response())
}

/// Has more, or less, logged from now on, until the daemon ends.
#[utoipa::path(put, path = "/v1/log-level", operation_id = "setLogLevel",
    request_body = LogLevel, responses(
    (status = 200, description = "What is logged from now on", body = LogLevel),
    openapi::WithBody,
))]
pub(super) async fn set_log_level(
    State(api): State<Api>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ErrorAnswer> {
    let LogLevel { level } = body::json(&headers, body, r#"{"level": LEVEL}"#).await?;
    let told: String = level.chars().take(LEVEL_TOLD).collect();
    let detail = Extension(Detail(format!("level={told:?}")));
    let asked = level.clone();
    let done = api.call(move |management| management.set_log_level(&asked)).await;
    let done = done.and_then(|done| Ok(done.map(|()| Json(LogLevel { level }))?));
    Ok((detail, done).into_response())
}

/// Changes as they happen, as server-sent events.
///
/// The current state comes first, as events. A reader that was too slow gets a comment and the
/// current state again. Comments keep the connection alive.
///
/// Events and their data: `requested-size` `{"requested_size": BYTES}`, `plugged-size`
/// `{"plugged_size": BYTES}`, `migration` `{"active": BOOL}`, `connected` and `disconnected`
/// `{"connected": BOOL}`, `resize` with what the device has as `resize`, at each change of its state
/// or of the kind of reason, `stray` `{"swept_size": BYTES}`.
#[utoipa::path(get, path = "/v1/events", operation_id = "getEvents", responses(
    (status = 200, description = "Events without end", body = String,
        content_type = "text/event-stream"),
    (status = 503, response = openapi::Busy),
))]
pub(super) async fn events(State(api): State<Api>) -> Response {
    let Ok(permit) = Arc::clone(&api.readers).try_acquire_owned() else {
        let detail = format!("{EVENT_READERS} clients read events already.");
        return ErrorAnswer::new(StatusCode::SERVICE_UNAVAILABLE, detail).into_response();
    };
    let events = event_stream::follow(api.caller, api.shutdown, permit);
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

/// Sizes, requests by type and response, latencies, discards, in the OpenMetrics text format.
#[utoipa::path(get, path = "/metrics", operation_id = "getMetrics", responses(
    (status = 200, description = "OpenMetrics text", body = String,
        content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8"),
    openapi::WithoutBody,
))]
pub(super) async fn metrics(State(api): State<Api>) -> Result<Response, ErrorAnswer> {
    let metrics = api.call(|management| management.metrics()).await?;
    Ok(([(header::CONTENT_TYPE, OPENMETRICS)], metrics).into_response())
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", operation_id = "getOpenApi", responses(
    (status = 200, description = "An OpenAPI document", body = Object),
    (status = 503, response = openapi::Busy),
))]
pub(super) async fn document() -> Response {
    /// One text for all, however many clients there are that do not read it.
    static TEXT: LazyLock<Bytes> =
        LazyLock::new(|| serde_json::to_vec(&openapi()).unwrap_or_default().into());
    ([(header::CONTENT_TYPE, "application/json")], TEXT.clone()).into_response()
}

async fn not_found(uri: Uri) -> ErrorAnswer {
    let detail = format!("There is no {}; GET /openapi.json lists what there is.", uri.path());
    ErrorAnswer::new(StatusCode::NOT_FOUND, detail)
}

async fn only_metrics() -> ErrorAnswer {
    let detail = "This socket serves GET /metrics alone; all else is at --api-socket.".to_owned();
    ErrorAnswer::new(StatusCode::NOT_FOUND, detail)
}

async fn method_not_allowed(method: Method, request: Request) -> ErrorAnswer {
    let detail = format!("{} does not support {method}.", request.uri().path());
    ErrorAnswer::new(StatusCode::METHOD_NOT_ALLOWED, detail)
}
