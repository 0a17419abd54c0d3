//! Who may call a daemon on loopback addresses: anyone on this machine, but no web page.
//!
//! Such a daemon asks for no credentials, so every local program is trusted. A browser on this machine is local too, and runs the programs of strangers. Two of
//! its ways in are closed here: a page's own requests carry the page's `Origin`, and a page whose
//! name was rebound to a loopback address carries that name as `Host`.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::{StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::Response;

use super::{Access, refuse};

/// Refuses requests whose `Host` or `Origin` is not a loopback one, unless everybody has to show
/// credentials, which a page does not have.
pub async fn loopback_only(State(access): State<Access>, request: Request, next: Next) -> Response {
    match check(&request) {
        Err(problem) if access == Access::Local => {
            let path = request.uri().path();
            refuse(path, StatusCode::FORBIDDEN, "forbidden", problem)
        }
        _ => next.run(request).await,
    }
}

fn check(request: &Request) -> Result<(), &'static str> {
    let bad_host = "the Host header must name a loopback address, such as localhost";
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let host = hosts.next().ok_or(bad_host)?;
    if hosts.next().is_some() || !host.to_str().is_ok_and(is_loopback) {
        return Err(bad_host);
    }
    // RFC 9112, section 3.2.2: a target in absolute form counts, and Host does not.
    if request
        .uri()
        .authority()
        .is_some_and(|target| !is_loopback(target.as_str()))
    {
        return Err(bad_host);
    }
    for origin in request.headers().get_all(header::ORIGIN) {
        let origin = origin
            .to_str()
            .ok()
            .and_then(|origin| origin.parse::<Uri>().ok());
        let is_local = origin
            .as_ref()
            .filter(|origin| origin.scheme().is_some())
            .and_then(Uri::authority)
            .is_some_and(|authority| is_loopback(authority.as_str()));
        if !is_local {
            return Err(
                "requests of web pages are refused unless the page is on a loopback address",
            );
        }
    }
    Ok(())
}

/// Whether `host` or `host:port` names this machine's loopback interface.
fn is_loopback(authority: &str) -> bool {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((host, port)) => (host, port),
            None => return false,
        },
        None => match authority.find(':') {
            Some(colon) => authority.split_at(colon),
            None => (authority, ""),
        },
    };
    let is_port = port.is_empty()
        || port
            .strip_prefix(':')
            .is_some_and(|port| port.parse::<u16>().is_ok());
    let host_is_loopback = host.eq_ignore_ascii_case("localhost")
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback());
    is_port && host_is_loopback
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    #[test]
    fn loopback_names_and_others() {
        for good in [
            "localhost",
            "LocalHost:8000",
            "127.0.0.1",
            "127.0.0.1:8080",
            "127.9.9.9:1",
            "[::1]",
            "[::1]:8000",
        ] {
            assert!(is_loopback(good), "{good}");
        }
        for bad in [
            "",
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example:80",
            "localhost:evil",
            "127.0.0.1@evil.example",
            "192.168.0.1",
            "0.0.0.0:8000",
            "[::]:1",
            "[::1",
            "::1",
            "localhost:99999",
            "localhost:80:80",
            "2130706433",
        ] {
            assert!(!is_loopback(bad), "{bad}");
        }
    }

    #[test]
    fn every_way_in_is_checked() {
        let ask = |uri: &str, headers: &[(&str, &str)]| {
            let mut request = Request::get(uri);
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            check(&request.body(Body::empty()).unwrap()).is_ok()
        };
        let local = ("host", "localhost:8000");
        assert!(ask("/", &[local]));
        assert!(ask("/", &[local, ("origin", "http://127.0.0.1:3000")]));
        assert!(!ask("/", &[]));
        assert!(!ask("/", &[("host", "evil.example")]));
        assert!(!ask("/", &[local, ("host", "evil.example")]));
        assert!(!ask("/", &[local, ("origin", "https://evil.example")]));
        assert!(!ask("/", &[local, ("origin", "null")]));
        assert!(!ask("/", &[local, ("origin", "localhost")]));
        assert!(!ask("http://evil.example/", &[local]));
    }
}
