//! Who calls: by a token, an API key, or from this machine.
//!
//! | path | without credentials |
//! |---|---|
//! | [`OPEN`], and the page at `/docs`, which says nothing of what there is | anybody |
//! | others of `/api/v1` | nobody |
//! | everything else | the local principal, while all listeners are on loopback addresses; else nobody |
//!
//! With credentials that are not good nobody comes in anywhere, lest a caller acts as somebody else
//! than it thinks.

use std::net::{IpAddr, SocketAddr};
use std::panic::resume_unwind;
use std::pin::pin;
use std::time::Instant;

use axum::extract::{ConnectInfo, FromRequestParts, MatchedPath, OriginalUri, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tokio::task::JoinError;
use tracing::{Instrument, error};

use super::rate::told_as_in;
use super::record::{Act, Record};
use super::{AppState, BEARER, refuse};
use crate::audit::{AuditError, UnderWay};
use crate::chain;
use crate::dialects::microvm;
use crate::domain::{Manager, Principal};
use crate::identity::{Credential, KEY_MARK};
use crate::metrics::{Answered, method_word};

/// The header of API keys.
pub const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Paths that need no credentials.
pub const OPEN: [&str; 6] = [
    "/health",
    "/openapi.yaml",
    "/openapi.json",
    "/api/v1/health",
    "/api/v1/auth/register",
    "/api/v1/auth/login",
];

/// Who may come in without credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Whoever is on this machine: all listeners are on loopback addresses.
    Local,
    /// Nobody.
    Credentials,
}

impl Access {
    /// What these listeners allow.
    pub fn of(listeners: &[SocketAddr]) -> Self {
        match listeners.iter().all(|address| address.ip().is_loopback()) {
            true => Self::Local,
            false => Self::Credentials,
        }
    }
}

/// Who a request is from, as an extension of it.
#[derive(Debug, Clone)]
pub struct Identified {
    /// Who; `None` is somebody without credentials at a path that needs none.
    pub principal: Option<Principal>,
    /// Address of the other end of the connection.
    pub source: Option<IpAddr>,
}

/// Who calls a handler, and what acts for them.
#[derive(Clone)]
pub struct Caller {
    /// Who.
    pub principal: Principal,
    /// Address of the other end of the connection.
    pub source: Option<IpAddr>,
    /// Sandboxes, as far as this caller may see and touch them.
    pub manager: Manager,
}

impl FromRequestParts<AppState> for Caller {
    type Rejection = Response;

    async fn from_request_parts(
        parts: &mut Parts,
        state: &AppState,
    ) -> Result<Self, Self::Rejection> {
        let identified = parts.extensions.get::<Identified>().cloned();
        match identified {
            Some(Identified {
                principal: Some(principal),
                source,
            }) => Ok(Self {
                manager: state.manager.acting_for(principal.clone()),
                principal,
                source,
            }),
            _ => Err(unauthorized(path_of(parts), NO_CREDENTIALS)),
        }
    }
}

const NO_CREDENTIALS: &str = "Authentication required";

/// Finds out who calls, lets nobody else in, counts requests, and has written down what was done
/// before the answer begins.
pub async fn authenticate(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let source = source_of(&request);
    let identified = identify(&state, request.headers(), request.uri().path()).await;
    let (principal, refused) = match identified {
        Ok(principal) => (principal, None),
        Err(refused) => (None, Some(refused)),
    };
    let who = Identified { principal, source };
    let act = Act::of(&request);
    let goes_on = act.is_of_accounts();
    let path = request.uri().path().to_owned();
    let answer = answer(state, who, act, refused, request, next);
    if !goes_on {
        return answer.await;
    }
    // Whoever guesses passwords and hangs up is on record with the name that was tried.
    let answered = tokio::spawn(answer.in_current_span()).await;
    match answered.map_err(JoinError::try_into_panic) {
        Ok(response) => response,
        Err(Ok(panic)) => resume_unwind(panic),
        Err(Err(_)) => {
            let status = StatusCode::SERVICE_UNAVAILABLE;
            refuse(&path, status, "service_unavailable", "the daemon is ending")
        }
    }
}

/// Answers, and has it on record.
async fn answer(
    state: AppState,
    who: Identified,
    act: Act,
    refused: Option<Box<Response>>,
    mut request: Request,
    next: Next,
) -> Response {
    let under_way = act
        .changes()
        .then(|| UnderWay::new(state.audit.clone(), act.begun(&who)));
    let is_limited = is_microvm(request.uri().path());
    let path = request.uri().path().to_owned();
    let (method, route) = (method_word(request.method()), route_of(&request));
    let began = Instant::now();
    let answer = async {
        match refused {
            Some(refused) => *refused,
            None => {
                request.extensions_mut().insert(who.clone());
                next.run(request).await
            }
        }
    };
    let answer = async {
        match is_limited {
            true => state.rates.limit(&who, answer).await,
            false => answer.await,
        }
    };
    let response = while_on_record(under_way.as_ref(), answer).await;
    let response = recorded(&state, &who, act, under_way, &path, response).await;
    let answered = Answered {
        method,
        route,
        status: response.status(),
        took: began.elapsed(),
    };
    state.metrics.answered(who.principal.as_ref(), answered);
    response
}

/// The answer, once what was done is on record, or that it is not.
async fn recorded(
    state: &AppState,
    who: &Identified,
    act: Act,
    under_way: Option<UnderWay>,
    path: &str,
    response: Response,
) -> Response {
    let record = act.record_for(response.status());
    if record == Record::None {
        return response;
    }
    let (entry, response) = act.record(who, response).await;
    // What is being written now is written even if the caller hangs up.
    if let Some(under_way) = under_way {
        under_way.answered();
    }
    let recorded = match record {
        Record::Together => state.audit.record_denied(entry).await,
        Record::Own | Record::None => state.audit.record(entry).await,
    };
    match recorded {
        Ok(()) => response,
        Err(source) => told_as_in(&response, not_on_record(path, &source)),
    }
}

/// Waits for the answer, and has it on record meanwhile that the act is under way if it takes long.
async fn while_on_record<T>(under_way: Option<&UnderWay>, answer: impl Future<Output = T>) -> T {
    let mut answer = pin!(answer);
    let Some(under_way) = under_way else {
        return answer.await;
    };
    tokio::select! {
        biased;
        answer = answer.as_mut() => answer,
        recorded = under_way.on_record() => {
            if let Err(source) = recorded {
                error!(error = chain(&source), "an act that is under way is not on record");
            }
            answer.await
        }
    }
}

/// It may have been done; that it was is not on record, which must not go unnoticed.
fn not_on_record(path: &str, source: &AuditError) -> Response {
    error!(error = chain(source), "an act is not on record");
    let status = StatusCode::INTERNAL_SERVER_ERROR;
    let message = "the audit log cannot be written; what was asked for may have been done";
    refuse(path, status, "internal_error", message)
}

/// The refusal of a request that goes to a port of a sandbox by headers, once it is on record.
pub async fn refused_at_port(
    state: &AppState,
    request: Request,
    sandbox: &str,
    refusal: Response,
) -> Response {
    let who = Identified {
        principal: None,
        source: source_of(&request),
    };
    let act = Act::on_port(request.method(), sandbox);
    let (entry, refusal) = act.record(&who, refusal).await;
    match state.audit.record_denied(entry).await {
        Ok(()) => refusal,
        Err(source) => not_on_record(request.uri().path(), &source),
    }
}

/// Address of the other end of the connection.
fn source_of(request: &Request) -> Option<IpAddr> {
    let connection = request.extensions().get::<ConnectInfo<SocketAddr>>();
    connection.map(|info| info.0.ip().to_canonical())
}

/// The path with the names of its parameters; there are as many paths that are none as anybody cares to
/// make up.
fn route_of(request: &Request) -> String {
    let matched = request.extensions().get::<MatchedPath>();
    matched.map_or("none", MatchedPath::as_str).to_owned()
}

/// Who calls this path with these headers; `None` is somebody without credentials at a path that needs
/// none.
///
/// # Errors
/// The answer to somebody who may not come in.
pub async fn identify(
    state: &AppState,
    headers: &HeaderMap,
    path: &str,
) -> Result<Option<Principal>, Box<Response>> {
    let unauthorized = |message| Err(Box::new(unauthorized(path, message)));
    let credential = match is_microvm(path) {
        true => credential(headers, of_socket(headers)),
        false => credential(headers, None),
    };
    match credential {
        Err(problem) => unauthorized(problem),
        Ok(Some(credential)) => match state.identity.authenticate(credential).await {
            Ok(Some(principal)) => Ok(Some(principal)),
            Ok(None) => unauthorized("the token or API key is not good, or not any more"),
            Err(source) if is_microvm(path) => {
                Err(Box::new(microvm::ApiError::from(source).into_response()))
            }
            Err(source) => Err(Box::new(
                crate::dialects::wrenn::ApiError::from(source).into_response(),
            )),
        },
        Ok(None) if OPEN.contains(&path) || is_page(path) => Ok(None),
        Ok(None) if is_microvm(path) => unauthorized(NO_CREDENTIALS),
        Ok(None) => match state.access {
            Access::Local => Ok(Some(Principal::Local)),
            Access::Credentials => unauthorized(NO_CREDENTIALS),
        },
    }
}

/// The path as it was asked for: a handler's own lacks what its routes have in common.
pub fn path_of(parts: &Parts) -> &str {
    match parts.extensions.get::<OriginalUri>() {
        Some(OriginalUri(uri)) => uri.path(),
        None => parts.uri.path(),
    }
}

/// Whether this path is of the page that shows the description of the API. Browsers have no credentials to
/// load it with; what is tried on it needs them.
fn is_page(path: &str) -> bool {
    path.strip_prefix("/docs")
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Whether this path belongs to the dialect `/api/v1`.
pub fn is_microvm(path: &str) -> bool {
    path.strip_prefix(microvm::BASE)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn unauthorized(path: &str, message: &str) -> Response {
    let mut response = refuse(path, StatusCode::UNAUTHORIZED, "unauthorized", message);
    let scheme = HeaderValue::from_static("Bearer");
    response
        .headers_mut()
        .insert(header::WWW_AUTHENTICATE, scheme);
    response
}

/// What the client of a WebSocket shows that cannot set headers, as a browser's: the value behind
/// [`BEARER`] in the list of its subprotocols.
fn of_socket(headers: &HeaderMap) -> Option<&str> {
    headers.get(header::UPGRADE)?;
    let offered = headers.get(header::SEC_WEBSOCKET_PROTOCOL)?.to_str().ok()?;
    let mut offered = offered.split(',').map(str::trim);
    (offered.next()? == BEARER).then(|| offered.next())?
}

/// What a caller shows.
fn credential<'a>(
    headers: &'a HeaderMap,
    of_socket: Option<&'a str>,
) -> Result<Option<Credential<'a>>, &'static str> {
    let text = |value: &'a HeaderValue| {
        let text = value.to_str();
        text.map_err(|_| "the token or API key has characters that none has")
    };
    let token = |text: &'a str| match text.starts_with(KEY_MARK) {
        true => Credential::Key(text),
        false => Credential::Token(text),
    };
    let tokens = headers.get_all(header::AUTHORIZATION).iter().map(|value| {
        let shown = text(value)?.split_once(' ');
        match shown {
            Some((scheme, shown)) if scheme.eq_ignore_ascii_case("bearer") => {
                Ok(token(shown.trim()))
            }
            _ => Err("the header Authorization must be Bearer and a token"),
        }
    });
    let keys = headers.get_all(API_KEY).iter();
    let keys = keys.map(|value| text(value).map(Credential::Key));
    let offered = of_socket.into_iter().map(|text| Ok(token(text)));
    let mut shown = tokens.chain(keys).chain(offered);
    let first = shown.next().transpose()?;
    match shown.next() {
        Some(_) => Err("show a token or an API key, and only one"),
        None => Ok(first),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_that_others_reach_is_enough() {
        let of = |addresses: &[&str]| {
            let addresses: Vec<_> = addresses.iter().map(|text| text.parse().unwrap()).collect();
            Access::of(&addresses)
        };
        assert_eq!(of(&["127.0.0.1:1", "[::1]:1"]), Access::Local);
        for other in ["0.0.0.0:1", "[::]:1", "192.0.2.1:1", "[::ffff:192.0.2.1]:1"] {
            assert_eq!(of(&["127.0.0.1:1", other]), Access::Credentials, "{other}");
        }
    }

    #[test]
    fn paths_of_the_dialect() {
        assert!(is_microvm("/api/v1"));
        assert!(is_microvm("/api/v1/vms"));
        assert!(!is_microvm("/api/v10/vms"));
        assert!(!is_microvm("/v1/sandboxes"));
    }
}
