//! How many WebSockets one caller has.
//!
//! Each costs a connection and a task, and some a process in a guest, for as long as its client likes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::auth::{Identified, is_microvm, path_of};
use super::{AppState, refuse};
use crate::dialects::microvm;
use crate::domain::UserId;

/// How many one user has at most, and the local principal. A thousand idle ones are promised.
pub const MAX_SOCKETS: usize = 2048;
/// The subprotocol that carries a token, as its second value, for clients that cannot set headers.
pub const BEARER: &str = "bearer";

/// The WebSockets that are open; clones share the count.
#[derive(Debug, Clone)]
pub struct Sockets {
    /// How many one user has at most.
    max: usize,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    open: Mutex<HashMap<Option<UserId>, usize>>,
    closed: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<Option<UserId>, usize>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Sockets {
    fn default() -> Self {
        Self::new(MAX_SOCKETS)
    }
}

impl Sockets {
    /// So many at most for each user.
    pub fn new(max: usize) -> Self {
        Self {
            max,
            shared: Arc::default(),
        }
    }

    /// One more for this user; `None` if that has as many as it may have.
    fn admit(&self, user: Option<UserId>) -> Option<SocketPermit> {
        let mut open = self.shared.lock();
        let count = open.entry(user.clone()).or_default();
        if *count >= self.max {
            return None;
        }
        *count += 1;
        drop(open);
        Some(SocketPermit {
            user,
            shared: Arc::clone(&self.shared),
        })
    }

    /// Waits until all are closed, or for this long.
    pub async fn closed(&self, patience: Duration) {
        let closed = async {
            loop {
                let changed = self.shared.closed.notified();
                if self.shared.lock().is_empty() {
                    return;
                }
                changed.await;
            }
        };
        // Whose client does not read stays.
        let _ = timeout(patience, closed).await;
    }
}

/// A WebSocket that is counted until this is dropped.
#[derive(Debug)]
pub struct SocketPermit {
    user: Option<UserId>,
    shared: Arc<Shared>,
}

impl Drop for SocketPermit {
    fn drop(&mut self) {
        let mut open = self.shared.lock();
        if let Some(count) = open.get_mut(&self.user) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.user);
            }
        }
        drop(open);
        self.shared.closed.notify_waiters();
    }
}

impl FromRequestParts<AppState> for SocketPermit {
    type Rejection = Response;

    async fn from_request_parts(
        parts: &mut Parts,
        state: &AppState,
    ) -> Result<Self, Self::Rejection> {
        let identified = parts.extensions.get::<Identified>();
        let principal = identified.and_then(|who| who.principal.as_ref());
        let user = principal.and_then(|principal| principal.owner().cloned());
        state.sockets.admit(user).ok_or_else(|| {
            let path = path_of(parts);
            let message = format!(
                "there are {} WebSockets open already; close some of them",
                state.sockets.max
            );
            match is_microvm(path) {
                true => microvm::ApiError::too_many(message, None).into_response(),
                false => refuse(
                    path,
                    StatusCode::TOO_MANY_REQUESTS,
                    "too_many_sockets",
                    &message,
                ),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_user_has_so_many() {
        let sockets = Sockets::default();
        let one = Some(UserId::random());
        let mut open: Vec<_> = (0..MAX_SOCKETS)
            .map(|_| sockets.admit(one.clone()).unwrap())
            .collect();
        assert!(sockets.admit(one.clone()).is_none());
        let local = sockets.admit(None).unwrap();
        open.pop();
        open.push(sockets.admit(one.clone()).unwrap());
        assert!(sockets.admit(one).is_none());
        let all = sockets.clone();
        let closed = tokio::spawn(async move { all.closed(Duration::from_secs(600)).await });
        drop(open);
        drop(local);
        closed.await.unwrap();
        assert!(sockets.shared.lock().is_empty());
    }
}
