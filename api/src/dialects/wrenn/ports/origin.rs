//! Origins of ports, and what browsers say of the requests that they send.

use axum::extract::Request;
use axum::http::header::ORIGIN;
use axum::http::{HeaderMap, Method};

use super::header;

/// The host by which a port of a sandbox is an origin of its own. Browsers take all names below
/// `localhost` for this machine (RFC 6761, section 6.3), so nothing has to be set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestHost {
    /// The sandbox.
    pub id: String,
    /// Its port.
    pub port: u16,
    /// The port of the daemon, if it is not that of HTTP.
    pub daemon_port: Option<u16>,
}

impl GuestHost {
    /// Reads a `Host` header; `None` if that names something else.
    pub fn parse(host: &str) -> Option<Self> {
        let (name, daemon_port) = match host.split_once(':') {
            Some((name, port)) => (name, Some(port.parse().ok()?)),
            None => (host, None),
        };
        let name = name.to_ascii_lowercase();
        let (port, id) = name.strip_suffix(".localhost")?.split_once('-')?;
        let is_number = port.bytes().all(|byte| byte.is_ascii_digit());
        let port = port.parse().ok().filter(|port| is_number && *port > 0)?;
        // No name of the API has a dot.
        (!id.is_empty() && !id.contains('.')).then(|| Self {
            id: id.to_owned(),
            port,
            daemon_port,
        })
    }

    /// Its `Host` header.
    pub fn authority(&self) -> String {
        let Self { id, port, .. } = self;
        match self.daemon_port {
            Some(daemon_port) => format!("{port}-{id}.localhost:{daemon_port}"),
            None => format!("{port}-{id}.localhost"),
        }
    }

    /// Whether who sends this may: the pages of this origin, whoever opens it, and what is no browser.
    ///
    /// # Errors
    /// A sentence.
    pub fn admit(&self, request: &Request) -> Result<(), &'static str> {
        let headers = request.headers();
        let own = format!("http://{}", self.authority());
        let is_own = |origin: &axum::http::HeaderValue| {
            origin.as_bytes().eq_ignore_ascii_case(own.as_bytes())
        };
        if !headers.get_all(ORIGIN).iter().all(is_own) {
            return Err("a web page of another origin may not send this to a sandbox");
        }
        match (header(headers, "sec-fetch-site"), Fetch::of(headers)) {
            (None | Some("same-origin" | "none"), _) => Ok(()),
            (Some(_), Some(Fetch::Navigation)) if *request.method() == Method::GET => Ok(()),
            (Some(_), _) => Err("a web page of another origin may not send this to a sandbox"),
        }
    }
}

/// What a browser says that a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fetch {
    /// Somebody opens a page, by itself and not within another.
    Navigation,
    /// Something else.
    Other,
}

impl Fetch {
    /// `None` if it is none of a browser.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let of_browser = ["sec-fetch-mode", "sec-fetch-site", "sec-fetch-dest"];
        if !of_browser.iter().any(|name| headers.contains_key(*name)) {
            return None;
        }
        let opens = header(headers, "sec-fetch-mode") == Some("navigate")
            && header(headers, "sec-fetch-dest") == Some("document");
        Some(if opens { Self::Navigation } else { Self::Other })
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    #[test]
    fn hosts_of_ports_and_others() {
        let host = GuestHost::parse("3000-SB-0a1b2c3d.localhost:8080").unwrap();
        assert_eq!(
            (host.port, host.id.as_str(), host.daemon_port),
            (3000, "sb-0a1b2c3d", Some(8080))
        );
        assert_eq!(host.authority(), "3000-sb-0a1b2c3d.localhost:8080");
        let host = GuestHost::parse("80-sb-0a1b2c3d.localhost").unwrap();
        assert_eq!(host.authority(), "80-sb-0a1b2c3d.localhost");
        for other in [
            "localhost",
            "localhost:8080",
            "127.0.0.1",
            "-sb-0a1b2c3d.localhost",
            "0-sb-0a1b2c3d.localhost",
            "+1-sb-0a1b2c3d.localhost",
            "80-.localhost",
            "80-a.b.localhost",
            "80-sb-0a1b2c3d.localhost.evil.example",
            "80-sb-0a1b2c3d.localhost:x",
            "evil.example",
            "",
        ] {
            assert_eq!(GuestHost::parse(other), None, "{other}");
        }
    }

    #[test]
    fn only_its_own_pages_and_who_opens_it_are_admitted() {
        let host = GuestHost::parse("80-x.localhost:8080").unwrap();
        let admits = |method: &str, headers: &[(&str, &str)]| {
            let mut request = Request::builder().method(method);
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            host.admit(&request.body(Body::empty()).unwrap()).is_ok()
        };
        let navigates = [
            ("sec-fetch-mode", "navigate"),
            ("sec-fetch-dest", "document"),
        ];
        let [mode, dest] = navigates;
        let own = ("origin", "http://80-x.localhost:8080");
        let cross = ("sec-fetch-site", "cross-site");
        assert!(admits("POST", &[]));
        assert!(admits(
            "POST",
            &[
                own,
                ("sec-fetch-site", "same-origin"),
                ("sec-fetch-mode", "cors")
            ]
        ));
        assert!(admits("GET", &[("sec-fetch-site", "none"), mode, dest]));
        assert!(admits("GET", &[cross, mode, dest]));
        assert!(!admits("POST", &[cross, mode, dest]));
        assert!(!admits("GET", &[cross, mode, ("sec-fetch-dest", "iframe")]));
        assert!(!admits("GET", &[cross, ("sec-fetch-mode", "no-cors")]));
        assert!(!admits(
            "GET",
            &[
                ("sec-fetch-site", "same-site"),
                ("sec-fetch-mode", "no-cors")
            ]
        ));
        for origin in [
            "null",
            "http://localhost:8080",
            "http://81-x.localhost:8080",
            "https://80-x.localhost:8080",
        ] {
            assert!(!admits("POST", &[("origin", origin)]), "{origin}");
            assert!(!admits("POST", &[own, ("origin", origin)]), "{origin}");
        }
    }
}
