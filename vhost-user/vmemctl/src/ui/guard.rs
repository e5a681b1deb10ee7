//! What may pass from a browser to the daemon.

use std::net::SocketAddr;

use hyper::header::{self, HeaderMap, HeaderName};
use hyper::{Method, StatusCode, Uri};
use management_api::Problem;

/// What the page reads.
const READ: [&str; 4] = ["/v1/device", "/v1/device/blocks", "/v1/device/resident", "/v1/events"];

/// Judges requests. What is not known to be the page's own is refused.
#[derive(Debug)]
pub(super) struct Guard {
    /// Names of this server in a Host header. Another site whose name was made to point here has its
    /// own (DNS rebinding).
    hosts: [String; 2],
    token: String,
}

/// What a request may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    /// The page, which has no secret in it.
    Page,
    /// A resource of the daemon.
    Read(&'static str),
}

impl Guard {
    pub(super) fn new(address: SocketAddr, token: String) -> Self {
        let hosts = [address.to_string(), format!("localhost:{}", address.port())];
        Self { hosts, token }
    }

    /// What a request may have, or why it is refused.
    pub(super) fn judge(
        &self,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
    ) -> Result<Pass, Problem> {
        if !self.names_this_server(headers) {
            let detail = format!("The Host header is to be {} alone.", self.hosts.join(" or "));
            return Err(refusal(StatusCode::MISDIRECTED_REQUEST, detail));
        }
        if method != Method::GET {
            let detail = format!("This proxy only reads, by GET; it does not pass {method} on.");
            return Err(refusal(StatusCode::METHOD_NOT_ALLOWED, detail));
        }
        if !self.is_of_this_origin(headers) {
            let detail = "Pages of other origins may not read this one.".to_owned();
            return Err(refusal(StatusCode::FORBIDDEN, detail));
        }
        // One that has an authority asks for a proxy to anywhere.
        let path = uri.path_and_query().filter(|_| uri.authority().is_none());
        let path = path.map_or("", |path| path.as_str());
        if path == "/" {
            return Ok(Pass::Page);
        }
        let Some(resource) = READ.into_iter().find(|&known| known == path) else {
            let detail =
                format!("Only what the page needs is passed on: / and {}.", READ.join(", "));
            return Err(refusal(StatusCode::NOT_FOUND, detail));
        };
        if !self.has_the_token(headers) {
            let detail = "The token in the address that `vmemctl ui` printed is needed.".to_owned();
            return Err(refusal(StatusCode::UNAUTHORIZED, detail));
        }
        Ok(Pass::Read(resource))
    }

    fn names_this_server(&self, headers: &HeaderMap) -> bool {
        single(headers, &header::HOST)
            .is_some_and(|host| self.hosts.iter().any(|name| name.eq_ignore_ascii_case(host)))
    }

    /// Browsers say where a request comes from, by one of two headers or both.
    fn is_of_this_origin(&self, headers: &HeaderMap) -> bool {
        let fetch_site = HeaderName::from_static("sec-fetch-site");
        let origin = !headers.contains_key(header::ORIGIN)
            || single(headers, &header::ORIGIN)
                .and_then(|origin| origin.strip_prefix("http://"))
                .is_some_and(|origin| self.hosts.iter().any(|name| name == origin));
        let site = !headers.contains_key(&fetch_site)
            || matches!(single(headers, &fetch_site), Some("same-origin" | "none"));
        origin && site
    }

    fn has_the_token(&self, headers: &HeaderMap) -> bool {
        single(headers, &header::AUTHORIZATION)
            .and_then(|value| value.strip_prefix("Bearer "))
            .is_some_and(|given| equal(given.as_bytes(), self.token.as_bytes()))
    }
}

/// The value of a header that is there once.
fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?;
    if values.next().is_some() { None } else { value.to_str().ok() }
}

/// Whether two texts are equal, in a time that does not tell where they differ.
fn equal(left: &[u8], right: &[u8]) -> bool {
    let different = left.iter().zip(right).fold(0, |bits, (left, right)| bits | (left ^ right));
    left.len() == right.len() && std::hint::black_box(different) == 0
}

fn refusal(status: StatusCode, detail: String) -> Problem {
    Problem::new(status.as_u16(), status.canonical_reason().unwrap_or("Refused"), detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: (&str, &str) = ("host", "127.0.0.1:7000");
    const TOKEN: (&str, &str) = ("authorization", "Bearer 5ec2e7");

    fn judge(method: &str, uri: &str, headers: &[(&str, &str)]) -> Result<Pass, u16> {
        let guard = Guard::new("127.0.0.1:7000".parse().unwrap(), "5ec2e7".to_owned());
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap());
        }
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        guard.judge(&method, &uri.parse().unwrap(), &map).map_err(|problem| problem.status)
    }

    #[test]
    fn the_page_passes_without_the_token_and_what_it_reads_with_it() {
        assert_eq!(judge("GET", "/", &[HOST]), Ok(Pass::Page));
        assert_eq!(judge("GET", "/", &[("host", "LOCALHOST:7000")]), Ok(Pass::Page));
        for resource in READ {
            assert_eq!(judge("GET", resource, &[HOST, TOKEN]), Ok(Pass::Read(resource)));
            assert_eq!(judge("GET", resource, &[HOST]), Err(401));
        }
    }

    #[test]
    fn wrong_tokens_are_refused() {
        for wrong in ["Bearer 5ec2e8", "Bearer 5ec2e", "Bearer 5ec2e77", "Bearer ", "5ec2e7", ""] {
            assert_eq!(judge("GET", "/v1/device", &[HOST, ("authorization", wrong)]), Err(401));
        }
        assert_eq!(judge("GET", "/v1/device", &[HOST, TOKEN, TOKEN]), Err(401), "twice");
    }

    #[test]
    fn other_names_of_this_host_are_refused() {
        for host in
            ["evil.example", "evil.example:7000", "127.0.0.1", "127.0.0.1:7001", "[::1]:7000", ""]
        {
            assert_eq!(judge("GET", "/", &[("host", host)]), Err(421), "{host}");
        }
        assert_eq!(judge("GET", "/", &[]), Err(421));
        assert_eq!(judge("GET", "/", &[HOST, ("host", "evil.example")]), Err(421));
    }

    #[test]
    fn other_origins_are_refused_even_with_the_token() {
        let own = [("origin", "http://127.0.0.1:7000"), ("sec-fetch-site", "same-origin")];
        assert!(judge("GET", "/v1/device", &[HOST, TOKEN, own[0], own[1]]).is_ok());
        assert!(judge("GET", "/", &[HOST, ("sec-fetch-site", "none")]).is_ok(), "typed");
        for (name, value) in [
            ("origin", "http://evil.example"),
            ("origin", "https://127.0.0.1:7000"),
            ("origin", "http://127.0.0.1:7001"),
            ("origin", "null"),
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
        ] {
            for path in ["/", "/v1/device"] {
                assert_eq!(judge("GET", path, &[HOST, TOKEN, (name, value)]), Err(403), "{value}");
            }
        }
    }

    #[test]
    fn nothing_passes_but_what_the_page_reads() {
        for method in ["PUT", "POST", "DELETE", "OPTIONS", "HEAD", "CONNECT"] {
            assert_eq!(judge(method, "/v1/device", &[HOST, TOKEN]), Err(405), "{method}");
        }
        for path in [
            "/metrics",
            "/openapi.json",
            "/v1/device/requested-size",
            "/v1/device/system-reset",
            "/v1/device?x",
            "/v1/device/",
            "//v1/device",
            "/v1/../v1/device",
            "/V1/device",
            "/?token=5ec2e7",
            "http://127.0.0.1:7000/v1/device",
        ] {
            assert_eq!(judge("GET", path, &[HOST, TOKEN]), Err(404), "{path}");
        }
    }
}
