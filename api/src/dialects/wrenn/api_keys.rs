//! API keys.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::{ApiError, parse};
use super::extract::Path;
use super::sandboxes::rfc3339;
use crate::domain::{Account, Quota};
use crate::http::{AppState, Caller, ErrorBody};
use crate::identity::{KeyError, KeyRecord, NewKey};

/// What the key shall be.
#[derive(Debug, Deserialize, ToSchema)]
pub struct CreateKeyRequest {
    /// A name for it, 1 to 64 characters.
    #[schema(min_length = 1, max_length = 64)]
    pub name: String,
    /// Name of the user whom it acts for; who makes it if not given. For administrators.
    #[schema(nullable = false)]
    pub user: Option<String>,
    /// How much the sandboxes that are made with it may have together, within the quota of the account that
    /// it acts for.
    #[serde(default)]
    #[schema(nullable = false)]
    pub quota: QuotaBody,
}

/// How much sandboxes may have together; 0 is no limit.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, ToSchema)]
#[schema(as = ApiKeyQuota)]
#[serde(default, deny_unknown_fields)]
pub struct QuotaBody {
    /// Sandboxes that run.
    pub sandboxes: u32,
    /// Their virtual CPUs.
    pub vcpus: u32,
    /// Their memory, in MiB.
    pub memory_mb: u64,
    /// Disks of all that are not deleted, as their guests see them, in MiB.
    pub disk_mb: u64,
}

impl From<Quota> for QuotaBody {
    fn from(quota: Quota) -> Self {
        let Quota {
            sandboxes,
            vcpus,
            memory_mb,
            disk_mb,
        } = quota;
        Self {
            sandboxes,
            vcpus,
            memory_mb,
            disk_mb,
        }
    }
}

impl From<QuotaBody> for Quota {
    fn from(body: QuotaBody) -> Self {
        let QuotaBody {
            sandboxes,
            vcpus,
            memory_mb,
            disk_mb,
        } = body;
        Self {
            sandboxes,
            vcpus,
            memory_mb,
            disk_mb,
        }
    }
}

/// An API key.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ApiKey)]
pub struct KeyBody {
    /// Its id, which is no secret.
    #[schema(example = "ak-0a1b2c3d")]
    pub id: String,
    /// Its name.
    pub name: String,
    /// What it begins with.
    #[schema(example = "mvs_a1B2c3")]
    pub prefix: String,
    /// The key itself, told only when it is made: for the header `X-API-Key`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub key: Option<String>,
    /// Name of the user whom it acts for; null if that is whoever is on this machine.
    pub user: Option<String>,
    /// How much the sandboxes that are made with it may have together.
    pub quota: QuotaBody,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: String,
    /// When it was last used, to the minute.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub last_used_at: Option<String>,
}

impl From<KeyRecord> for KeyBody {
    fn from(record: KeyRecord) -> Self {
        Self {
            id: record.id.into(),
            name: record.name,
            prefix: record.prefix,
            key: None,
            user: match record.account {
                Account::Local => None,
                Account::User(user) => Some(user.name),
            },
            quota: record.quota.into(),
            created_at: rfc3339(record.created_at),
            last_used_at: record.last_used_at.map(rfc3339),
        }
    }
}

impl From<KeyError> for ApiError {
    fn from(source: KeyError) -> Self {
        let text = source.to_string();
        match source {
            KeyError::Invalid(_) => Self::invalid(text),
            KeyError::Forbidden | KeyError::HasQuota => {
                Self::new(StatusCode::FORBIDDEN, "forbidden", text)
            }
            KeyError::NotFound => Self::new(StatusCode::NOT_FOUND, "not_found", text),
            KeyError::Random(_) => Self::internal(text),
            KeyError::Store(source) => source.into(),
        }
    }
}

/// Make an API key
///
/// The answer has the key, which is kept nowhere and cannot be told again.
#[utoipa::path(
    post, path = "/v1/api-keys", operation_id = "createApiKey", tag = "api-keys",
    request_body = CreateKeyRequest,
    responses(
        (status = 201, description = "The key", body = KeyBody),
        (status = 400, description = "The request makes no sense", body = ErrorBody),
        (status = 403, description = "Only an administrator may do that, or the caller's own key has a quota", body = ErrorBody),
    ),
)]
pub async fn create(
    State(state): State<AppState>,
    caller: Caller,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<KeyBody>), ApiError> {
    let request: CreateKeyRequest = parse(body)?;
    let new = NewKey {
        name: request.name,
        user: request.user,
        quota: request.quota.into(),
    };
    let (key, record) = state.identity.create_key(new, &caller.principal).await?;
    let body = KeyBody {
        key: Some(key),
        ..record.into()
    };
    Ok((StatusCode::CREATED, Json(body)))
}

/// List API keys
///
/// Newest first: those that act for the caller, or all for an administrator.
#[utoipa::path(
    get, path = "/v1/api-keys", operation_id = "listApiKeys", tag = "api-keys",
    responses((status = 200, description = "List of keys", body = Vec<KeyBody>)),
)]
pub async fn list(
    State(state): State<AppState>,
    caller: Caller,
) -> Result<Json<Vec<KeyBody>>, ApiError> {
    let keys = state.identity.list_keys(&caller.principal).await?;
    Ok(Json(keys.into_iter().map(Into::into).collect()))
}

/// Revoke an API key
///
/// The next request with it is refused.
#[utoipa::path(
    delete, path = "/v1/api-keys/{id}", operation_id = "revokeApiKey", tag = "api-keys",
    params(("id" = String, Path)),
    responses(
        (status = 204, description = "It is revoked"),
        (status = 404, description = "No such key", body = ErrorBody),
    ),
)]
pub async fn revoke(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    state.identity.revoke_key(&id, &caller.principal).await?;
    Ok(StatusCode::NO_CONTENT)
}
