//! A line in the log for each change that a client asks for: by whom, what, and how it was answered.

use axum::http::{Method, Request, Response};

use crate::sys::peer_cred::PeerCred;

/// What of a path is told; those that there are, are shorter.
const PATH: usize = 100;

/// What of a change its answer does not say, as text. Goes with the answer to be told here.
#[derive(Clone)]
pub(super) struct Detail(pub(super) String);

/// A request that is told of once it is answered.
pub(super) struct Audit {
    peer: Option<PeerCred>,
    method: Method,
    path: String,
}

impl Audit {
    /// Of a request; `None` for one that only looks.
    pub(super) fn of<T>(request: &Request<T>, peer: Option<PeerCred>) -> Option<Self> {
        if request.method().is_safe() {
            return None;
        }
        // A path has no control characters: it was read as one of HTTP.
        let path = request.uri().path().chars().take(PATH).collect();
        Some(Self { peer, method: request.method().clone(), path })
    }

    /// Tells of it.
    pub(super) fn answered<T>(&self, answer: &Response<T>) {
        let Self { peer, method, path } = self;
        let detail = answer.extensions().get::<Detail>().map(|Detail(text)| text.as_str());
        let (pid, uid) = (peer.map(|peer| peer.pid), peer.map(|peer| peer.uid));
        let status = answer.status().as_u16();
        tracing::info!(pid, uid, %method, path, detail, status, "change by the API");
    }
}
