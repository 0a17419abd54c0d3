//! HTTP servers in sandboxes.
//!
//! A request reaches a port of a sandbox in one of three ways:
//!
//! | | For |
//! |---|---|
//! | path `/v1/sandboxes/{id}/ports/{port}/…` | programs |
//! | headers `X-Sandbox-Id` and `X-Sandbox-Port`, at any path | programs |
//! | host `{port}-{id}.localhost`, at any path | browsers, and programs |
//!
//! The connection goes through the agent to the guest's loopback interface, so a sandbox needs no
//! network card for it.
//!
//! # Browsers
//!
//! A page of a guest is a stranger's. On the origin of the daemon it could drive the whole API as the
//! user. So it never gets there: what comes from a browser, which says so by `Sec-Fetch-Mode`, is
//! sent on to the origin that the port has for itself if it is a navigation, and refused if not; and as
//! browsers of before 2023 do not say so, all answers on the daemon's origin have a
//! `Content-Security-Policy` that takes the origin from the page. Cookies, which know no ports and so
//! belong to other services of this machine, pass neither way there. The guard of the API refuses what
//! pages of other origins send, those of sandboxes included.

mod forward;
mod origin;

use std::borrow::Cow;

use axum::extract::{OriginalUri, Request, State};
use axum::http::header::HOST;
use axum::http::{HeaderMap, Method, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Redirect, Response};
use percent_encoding::percent_decode_str;

use super::error::ApiError;
use crate::domain::Principal;
use crate::http::{Access, AppState, Caller, ErrorBody, identify, refused_at_port};
use forward::{Route, forward};
use origin::{Fetch, GuestHost};

/// The path of this dialect.
const BASE: &str = "/v1";
/// The header that names a sandbox.
const SANDBOX_ID: &str = "x-sandbox-id";
/// The header that names a port of it.
const SANDBOX_PORT: &str = "x-sandbox-port";

/// Reach an HTTP server in a sandbox
///
/// Any method, any path below, with bodies as streams both ways, and WebSockets and other upgrades. The
/// same by the headers `X-Sandbox-Id` and `X-Sandbox-Port` at any path, and by the host
/// `{port}-{id}.localhost`, which is the way for browsers: their navigations to this path are sent on
/// to there, and what else they send is refused. The server sees the path without the prefix, which
/// `X-Forwarded-Prefix` tells.
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}/ports/{port}/{path}", operation_id = "forwardToPort",
    tag = "sandboxes",
    params(
        ("id" = String, Path),
        ("port" = u16, Path, description = "A TCP port, 1 to 65535"),
        ("path" = String, Path, description = "The path at the server, of any number of segments"),
    ),
    responses(
        (status = 200, description = "Whatever the server answers"),
        (status = 307, description = "A browser is sent to the origin of the port"),
        (status = 400, description = "There is no such port", body = ErrorBody),
        (status = 403, description = "A web page sent it", body = ErrorBody),
        (status = 404, description = "Sandbox not found", body = ErrorBody),
        (status = 409, description = "Sandbox not running, or too many connections",
            body = ErrorBody),
        (status = 502, description = "Nothing listens on the port, or what does speaks no HTTP/1.1",
            body = ErrorBody),
    ),
)]
pub async fn by_path(
    caller: Caller,
    OriginalUri(uri): OriginalUri,
    request: Request,
) -> Result<Response, ApiError> {
    // What follows is as it was sent: what is escaped in it is the server's business.
    let (prefix, path) = split_after(uri.path(), 5);
    let (id, port) = (&segment(prefix, 3)?, port_of(&segment(prefix, 5)?)?);
    let path = if path.is_empty() { "/" } else { path };
    let target = match uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    if let Some(answer) = not_a_browser(&request, id, port, &target)? {
        return Ok(answer);
    }
    let route = Route {
        port,
        target,
        prefix: prefix.to_owned(),
        is_own_origin: false,
    };
    let in_use = caller.manager.running(id).await?;
    forward(&caller.manager, in_use, route, request).await
}

/// Serves requests that name a port by headers; the others go on.
pub async fn by_header(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let (Some(id), Some(port)) = (
        header(request.headers(), SANDBOX_ID),
        header(request.headers(), SANDBOX_PORT),
    ) else {
        return next.run(request).await;
    };
    let (id, port) = (id.to_owned(), port.to_owned());
    // The path is the guest's, and says nothing of who may come in.
    let manager = match identify(&state, request.headers(), BASE).await {
        Ok(Some(principal)) => state.manager.acting_for(principal),
        Ok(None) => return next.run(request).await,
        Err(refusal) => return refused_at_port(&state, request, &id, *refusal).await,
    };
    let served = async {
        let port = port_of(&port)?;
        let target = target_of(request.uri());
        if let Some(answer) = not_a_browser(&request, &id, port, &target)? {
            return Ok(answer);
        }
        let route = Route {
            port,
            target,
            prefix: String::new(),
            is_own_origin: false,
        };
        let in_use = manager.running(&id).await?;
        forward(&manager, in_use, route, request).await
    };
    served.await.unwrap_or_else(ApiError::into_response)
}

/// Serves requests for the origins of ports, as those of the local principal; the others go
/// on. A daemon that asks for credentials has no such origins: a browser has none to show.
pub async fn by_host(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let mut hosts = request.headers().get_all(HOST).iter();
    let host = hosts.next().and_then(|host| host.to_str().ok());
    let guest = host.and_then(GuestHost::parse);
    let is_local = state.access == Access::Local;
    let (Some(guest), None, true) = (guest, hosts.next(), is_local) else {
        return next.run(request).await;
    };
    let served = async {
        guest.admit(&request).map_err(ApiError::forbidden)?;
        let route = Route {
            port: guest.port,
            target: target_of(request.uri()),
            prefix: String::new(),
            is_own_origin: true,
        };
        let manager = state.manager.acting_for(Principal::Local);
        let in_use = manager.running(&guest.id).await?;
        forward(&manager, in_use, route, request).await
    };
    served.await.unwrap_or_else(ApiError::into_response)
}

/// What a browser is answered on the daemon's origin; nothing for others.
fn not_a_browser(
    request: &Request,
    id: &str,
    port: u16,
    target: &str,
) -> Result<Option<Response>, ApiError> {
    let own = GuestHost {
        id: id.to_owned(),
        port,
        daemon_port: daemon_port(request.headers()),
    };
    match Fetch::of(request.headers()) {
        None => Ok(None),
        Some(Fetch::Navigation) if *request.method() == Method::GET => {
            let to = format!("http://{}{target}", own.authority());
            Ok(Some(Redirect::temporary(&to).into_response()))
        }
        Some(_) => Err(ApiError::forbidden(format!(
            "web pages reach this port at http://{}/ only, which is an origin of its own",
            own.authority()
        ))),
    }
}

/// The port in the `Host` header.
fn daemon_port(headers: &HeaderMap) -> Option<u16> {
    let authority = header(headers, HOST.as_str())?.parse::<axum::http::uri::Authority>();
    authority.ok()?.port_u16()
}

fn port_of(text: &str) -> Result<u16, ApiError> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    let port = text.parse().ok().filter(|port| is_number && *port > 0);
    port.ok_or_else(|| ApiError::invalid(format!("port must be 1 to 65535, not {text:?}")))
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn target_of(uri: &Uri) -> String {
    uri.path_and_query()
        .map_or_else(|| "/".to_owned(), ToString::to_string)
}

/// What the segment of this number says; the first follows the first slash.
fn segment(path: &str, number: usize) -> Result<Cow<'_, str>, ApiError> {
    let segment = path.split('/').nth(number).unwrap_or_default();
    let text = percent_decode_str(segment).decode_utf8();
    text.map_err(|_| ApiError::invalid(format!("invalid path: {segment:?} is not UTF-8")))
}

/// `path` cut after so many segments.
fn split_after(path: &str, segments: usize) -> (&str, &str) {
    let cut = path.match_indices('/').nth(segments);
    path.split_at(cut.map_or(path.len(), |(at, _)| at))
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;

    use super::*;

    #[test]
    fn the_path_of_the_server_is_what_follows() {
        for (path, prefix, rest) in [
            ("/v1/sandboxes/x/ports/80", "/v1/sandboxes/x/ports/80", ""),
            ("/v1/sandboxes/x/ports/80/", "/v1/sandboxes/x/ports/80", "/"),
            (
                "/v1/s/x/ports/80/a%2Fb//c/",
                "/v1/s/x/ports/80",
                "/a%2Fb//c/",
            ),
        ] {
            assert_eq!(split_after(path, 5), (prefix, rest));
        }
    }

    #[test]
    fn segments_are_text() {
        let path = "/v1/sandboxes/a%20%C3%BC/ports/%FF";
        assert_eq!(segment(path, 3).unwrap(), "a \u{fc}");
        assert_eq!(
            segment(path, 5).unwrap_err().status,
            StatusCode::BAD_REQUEST
        );
        assert_eq!(segment(path, 6).unwrap(), "");
    }

    #[test]
    fn ports_are_numbers() {
        assert_eq!(port_of("65535").ok(), Some(65535));
        for bad in ["0", "65536", "+80", "-1", "", "8o"] {
            assert_eq!(port_of(bad).unwrap_err().status, StatusCode::BAD_REQUEST);
        }
    }
}
