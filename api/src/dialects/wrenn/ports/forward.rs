//! One request to a server in a sandbox, and its answer.
//!
//! Each has a connection of its own. Bodies pass as they come, and hold each other up.

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_SECURITY_POLICY, COOKIE, EXPECT, HOST, HeaderName,
    HeaderValue, LOCATION, ORIGIN, SET_COOKIE, STRICT_TRANSPORT_SECURITY, TE, TRAILER,
    TRANSFER_ENCODING, UPGRADE,
};
use axum::http::{HeaderMap, StatusCode, Uri, Version};
use axum::response::Response;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tracing::debug;

use super::super::error::ApiError;
use crate::chain;
use crate::domain::{InUse, Manager};

/// The most of an answer's head that is read, in bytes, and of its body that is held.
const MAX_BUFFER: usize = 64 * 1024;
/// What is told of one connection only (RFC 9110, section 7.6.1), beside what `Connection` names.
const HOP_BY_HOP: [HeaderName; 8] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("proxy-authenticate"),
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];
/// What is for the daemon, or told by it.
const OF_THE_DAEMON: [HeaderName; 10] = [
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static(super::SANDBOX_ID),
    HeaderName::from_static(super::SANDBOX_PORT),
    HeaderName::from_static("proxy-authorization"),
    HeaderName::from_static("forwarded"),
    HeaderName::from_static("x-forwarded-for"),
    HeaderName::from_static("x-forwarded-host"),
    HeaderName::from_static("x-forwarded-proto"),
    HeaderName::from_static("x-forwarded-prefix"),
    EXPECT,
];
/// What an answer may not say for the daemon's origin.
const OF_THE_ORIGIN: [HeaderName; 5] = [
    SET_COOKIE,
    STRICT_TRANSPORT_SECURITY,
    HeaderName::from_static("clear-site-data"),
    HeaderName::from_static("service-worker-allowed"),
    HeaderName::from_static("alt-svc"),
];
/// Takes its origin from a page: it is of no origin that anything else has.
const SANDBOXED: HeaderValue = HeaderValue::from_static("sandbox");

/// Where a request goes.
#[derive(Debug)]
pub struct Route {
    /// The port.
    pub port: u16,
    /// Path and query at the server.
    pub target: String,
    /// What the path has before that for the client.
    pub prefix: String,
    /// Whether the client reaches the port by an origin that is the port's own.
    pub is_own_origin: bool,
}

/// Forwards a request to a sandbox.
///
/// # Errors
/// There is no answer.
pub async fn forward(
    manager: &Manager,
    in_use: InUse,
    route: Route,
    mut request: Request,
) -> Result<Response, ApiError> {
    let host = request.headers().get(HOST).cloned();
    let protocol = upgrade_of(request.headers());
    let client = protocol.is_some().then(|| hyper::upgrade::on(&mut request));
    let (mut parts, body) = request.into_parts();
    parts.uri = route
        .target
        .parse::<Uri>()
        .map_err(|source| ApiError::invalid(format!("the path cannot be forwarded: {source}")))?;
    parts.version = Version::HTTP_11;
    rewrite_request(&mut parts.headers, host.as_ref(), &route)?;
    if let Some(protocol) = &protocol {
        upgrade(&mut parts.headers, protocol);
    } else {
        parts
            .headers
            .insert(CONNECTION, HeaderValue::from_static("close"));
    }
    let connection = manager.connect(in_use, route.port).await?;
    let failed = |source: hyper::Error| {
        ApiError::agent(format!(
            "what listens on port {} of the sandbox did not answer as HTTP/1.1 has it: {}",
            route.port,
            chain(&source)
        ))
    };
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(MAX_BUFFER)
        .handshake(TokioIo::new(connection))
        .await
        .map_err(failed)?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            debug!(error = chain(&error), "connection to a port broke off");
        }
    });
    let request = hyper::Request::from_parts(parts, body);
    let mut response = sender.send_request(request).await.map_err(failed)?;
    let server = match (response.status(), client) {
        (StatusCode::SWITCHING_PROTOCOLS, Some(client)) => {
            let server = hyper::upgrade::on(&mut response);
            Some((client, server))
        }
        (StatusCode::SWITCHING_PROTOCOLS, None) => {
            return Err(ApiError::agent(format!(
                "what listens on port {} of the sandbox switched to a protocol that it was not \
                 asked for",
                route.port
            )));
        }
        _ => None,
    };
    let (mut parts, body) = response.into_parts();
    let switched = parts.headers.get(UPGRADE).cloned();
    rewrite_response(&mut parts.headers, host.as_ref(), &route);
    if let Some((client, server)) = server {
        if let Some(protocol) = switched.or(protocol) {
            upgrade(&mut parts.headers, &protocol);
        }
        tokio::spawn(async move {
            let (Ok(client), Ok(server)) = tokio::join!(client, server) else {
                return;
            };
            let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
            // However it ends, there is nobody to tell.
            let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
        });
        return Ok(Response::from_parts(parts, Body::empty()));
    }
    Ok(Response::from_parts(parts, Body::new(body)))
}

/// The protocol that a request wants to switch to.
fn upgrade_of(headers: &HeaderMap) -> Option<HeaderValue> {
    let wants = named_by_connection(headers).any(|name| name.eq_ignore_ascii_case("upgrade"));
    headers.get(UPGRADE).filter(|_| wants).cloned()
}

fn upgrade(headers: &mut HeaderMap, protocol: &HeaderValue) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, protocol.clone());
}

fn named_by_connection(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(CONNECTION).iter();
    let values = values.filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',').map(str::trim))
}

/// Takes away what is told of one connection only.
fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = named_by_connection(headers)
        .filter_map(|name| name.parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

fn rewrite_request(
    headers: &mut HeaderMap,
    host: Option<&HeaderValue>,
    route: &Route,
) -> Result<(), ApiError> {
    let bad = |_| ApiError::invalid("the Host header or the path cannot be forwarded");
    remove_hop_by_hop(headers);
    for name in &OF_THE_DAEMON {
        headers.remove(name);
    }
    if !route.is_own_origin {
        // Of other services of this machine, for cookies know no ports.
        headers.remove(COOKIE);
        // What a client has for the daemon, a guest must not learn.
        headers.remove(AUTHORIZATION);
    }
    // As whoever is in the guest would call it, which servers that check it expect.
    let own = format!("localhost:{}", route.port);
    let told = host.and_then(|host| host.to_str().ok()).unwrap_or_default();
    let from_here = |origin: &HeaderValue| origin.as_bytes() == format!("http://{told}").as_bytes();
    if headers.get(ORIGIN).is_some_and(from_here) {
        let origin = format!("http://{own}").parse().map_err(bad)?;
        headers.insert(ORIGIN, origin);
    }
    headers.insert(HOST, own.parse().map_err(bad)?);
    let mut tell = |name: &'static str, value: &str| {
        let value = HeaderValue::from_str(value).map_err(bad)?;
        headers.insert(HeaderName::from_static(name), value);
        Ok::<_, ApiError>(())
    };
    tell("x-forwarded-proto", "http")?;
    if !told.is_empty() && !told.contains(['"', '\\']) {
        tell("x-forwarded-host", told)?;
        tell("forwarded", &format!("host=\"{told}\";proto=http"))?;
    }
    if !route.prefix.is_empty() {
        tell("x-forwarded-prefix", &route.prefix)?;
    }
    Ok(())
}

fn rewrite_response(headers: &mut HeaderMap, host: Option<&HeaderValue>, route: &Route) {
    remove_hop_by_hop(headers);
    let location = headers.get(LOCATION).and_then(|value| value.to_str().ok());
    let host = host.and_then(|host| host.to_str().ok());
    if let Some(location) = location
        && let Some(moved) = relocate(location, host, route)
        && let Ok(moved) = moved.parse()
    {
        headers.insert(LOCATION, moved);
    }
    if !route.is_own_origin {
        for name in &OF_THE_ORIGIN {
            headers.remove(name);
        }
        // Beside those of the server: a browser keeps to all of them.
        headers.append(CONTENT_SECURITY_POLICY, SANDBOXED);
    }
}

/// Where a redirect of the server leads for the client, if that is another place. All that would lead to
/// the daemon leads to the server.
fn relocate(location: &str, host: Option<&str>, route: &Route) -> Option<String> {
    let own = format!("localhost:{}", route.port);
    let path = match location.split_once("://") {
        Some((_, rest)) => {
            let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
            let (authority, path) = rest.split_at(end);
            if authority != own && Some(authority) != host {
                return None;
            }
            path
        }
        None if location.starts_with('/') && !location.starts_with("//") => location,
        None => return None,
    };
    let slash = if path.starts_with('/') { "" } else { "/" };
    Some(format!("{}{slash}{path}", route.prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(prefix: &str) -> Route {
        Route {
            port: 3000,
            target: "/".to_owned(),
            prefix: prefix.to_owned(),
            is_own_origin: prefix.is_empty(),
        }
    }

    fn headers(all: &[(&str, &str)]) -> HeaderMap {
        let pairs = all.iter().map(|(name, value)| {
            let name: HeaderName = name.parse().unwrap();
            (name, HeaderValue::from_str(value).unwrap())
        });
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(name, value);
        }
        headers
    }

    #[test]
    fn what_is_for_one_connection_or_for_the_daemon_does_not_pass() {
        let mut request = headers(&[
            ("connection", "close, X-Private"),
            ("connection", "keep-alive"),
            ("x-private", "1"),
            ("keep-alive", "5"),
            ("transfer-encoding", "chunked"),
            ("x-api-key", "secret"),
            ("x-forwarded-for", "1.2.3.4"),
            ("cookie", "of=others"),
            ("authorization", "Bearer secret"),
            ("origin", "http://localhost:8080"),
            ("accept", "*/*"),
        ]);
        let host = HeaderValue::from_static("localhost:8080");
        rewrite_request(&mut request, Some(&host), &route("/p")).unwrap();
        let expected = headers(&[
            ("accept", "*/*"),
            ("origin", "http://localhost:3000"),
            ("host", "localhost:3000"),
            ("x-forwarded-proto", "http"),
            ("x-forwarded-host", "localhost:8080"),
            ("forwarded", "host=\"localhost:8080\";proto=http"),
            ("x-forwarded-prefix", "/p"),
        ]);
        assert_eq!(request, expected);
        let mut response = headers(&[
            ("connection", "upgrade"),
            ("upgrade", "x"),
            ("set-cookie", "a=b"),
            ("clear-site-data", "\"*\""),
            ("content-security-policy", "default-src *"),
        ]);
        rewrite_response(&mut response, Some(&host), &route("/p"));
        let expected = headers(&[
            ("content-security-policy", "default-src *"),
            ("content-security-policy", "sandbox"),
        ]);
        assert_eq!(response, expected);
    }

    #[test]
    fn redirects_lead_to_the_server_again() {
        let to = |location: &str| relocate(location, Some("localhost:8080"), &route("/p"));
        assert_eq!(to("/login?x#y").as_deref(), Some("/p/login?x#y"));
        assert_eq!(to("http://localhost:3000").as_deref(), Some("/p/"));
        assert_eq!(to("http://localhost:3000/a").as_deref(), Some("/p/a"));
        assert_eq!(
            to("http://localhost:8080/v1/sandboxes").as_deref(),
            Some("/p/v1/sandboxes")
        );
        for same in [
            "login",
            "../x",
            "//example.org/",
            "https://example.org/a",
            "",
        ] {
            assert_eq!(to(same), None, "{same}");
        }
    }
}
