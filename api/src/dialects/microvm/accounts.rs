//! Register and log in.

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::{ApiError, ErrorBody};
use super::fields::Fields;
use super::rfc3339;
use crate::domain::Role;
use crate::http::{AppState, Identified, LoggedIn};
use crate::identity::{
    HashError, LoginError, NewUser, RegisterError, TOKEN_SECONDS, UserRecord, check_name,
    weaknesses,
};

/// Who to register.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "it describes the body, which `Fields` reads")]
#[schema(as = MicrovmRegister)]
pub struct RegisterRequest {
    /// 1 to 64 of the characters A-Z, a-z, 0-9, `-` and `_`. Nobody else's, whatever the case.
    #[schema(min_length = 1, max_length = 64, pattern = "^[A-Za-z0-9_-]+$")]
    pub username: String,
    /// At least 8 characters: an upper and a lower case letter, a digit, and one that is neither
    /// letter nor digit. Must not contain the user name.
    #[schema(min_length = 8, max_length = 256)]
    pub password: String,
    /// What they may do. Only an administrator makes another one, except for the first user.
    #[schema(inline, default = "user")]
    pub role: Option<RoleBody>,
}

/// A user.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = MicrovmUser)]
pub struct UserBody {
    /// For programs.
    #[schema(example = "us-0123456789abcdef")]
    pub user_id: String,
    /// For people.
    pub username: String,
    /// What they may do.
    #[schema(inline)]
    pub role: RoleBody,
    /// When they registered.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: String,
}

/// What a user may do.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RoleBody {
    /// See and touch their own things.
    User,
    /// See and touch everything.
    Admin,
}

impl From<Role> for RoleBody {
    fn from(role: Role) -> Self {
        match role {
            Role::User => Self::User,
            Role::Admin => Self::Admin,
        }
    }
}

/// Who to log in.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "it describes the body, which `Fields` reads")]
#[schema(as = MicrovmLogin)]
pub struct LoginRequest {
    /// Name of the user.
    pub username: String,
    /// Their password.
    pub password: String,
}

/// A token.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = MicrovmToken)]
pub struct TokenBody {
    /// To be sent as `Authorization: Bearer …`.
    pub access_token: String,
    /// Always `bearer`.
    #[schema(example = "bearer")]
    pub token_type: &'static str,
    /// For how many seconds it is good.
    #[schema(example = 3600)]
    pub expires_in: u64,
}

impl From<UserRecord> for UserBody {
    fn from(record: UserRecord) -> Self {
        Self {
            user_id: record.user.id.into(),
            username: record.user.name,
            role: record.user.role.into(),
            created_at: rfc3339(record.created_at),
        }
    }
}

impl From<HashError> for ApiError {
    fn from(source: HashError) -> Self {
        match source {
            HashError::Busy => Self::too_many(source.to_string(), Some(1)),
            HashError::Failed(_) => Self::internal(&source),
        }
    }
}

impl From<RegisterError> for ApiError {
    fn from(source: RegisterError) -> Self {
        match source {
            RegisterError::Invalid { name, password } => {
                let mut fields = Fields::default();
                if let Some(name) = name {
                    fields.wrong("username", name);
                }
                for weakness in password {
                    fields.wrong("password", weakness.to_string());
                }
                fields.into_error()
            }
            RegisterError::Forbidden(_) => Self::forbidden(source.to_string()),
            RegisterError::NameTaken(_) => Self::conflict(source.to_string()),
            RegisterError::Hash(source) => source.into(),
            RegisterError::Store(source) => source.into(),
        }
    }
}

impl From<LoginError> for ApiError {
    fn from(source: LoginError) -> Self {
        match source {
            LoginError::Wrong => Self::unauthorized(source.to_string()),
            LoginError::Locked(rest) => {
                Self::too_many(source.to_string(), Some(rest.as_secs().max(1)))
            }
            LoginError::Hash(source) => source.into(),
            LoginError::Token => Self::internal(&source),
            LoginError::Store(source) => source.into(),
        }
    }
}

/// Register a user
#[utoipa::path(
    post, path = "/api/v1/auth/register", operation_id = "registerUser", tag = "accounts",
    request_body = RegisterRequest,
    responses(
        (status = 201, description = "The user is registered", body = UserBody),
        (status = 400, description = "The body is no JSON object", body = ErrorBody),
        (status = 401, description = "The token is not good", body = ErrorBody),
        (status = 403, description = "Only an administrator may do that", body = ErrorBody),
        (status = 409, description = "Another has this name", body = ErrorBody),
        (status = 422, description = "The name is none, or the password is weak", body = ErrorBody),
        (status = 429, description = "Too many at once", body = ErrorBody),
    ),
)]
pub async fn register(
    State(state): State<AppState>,
    Extension(caller): Extension<Identified>,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<UserBody>), ApiError> {
    let mut fields = Fields::parse(body)?;
    let name = fields.required("username", Fields::string);
    if let Some(Err(problem)) = name.as_deref().map(check_name) {
        fields.wrong("username", problem);
    }
    let password = fields.required("password", Fields::string);
    if let Some(password) = &password {
        for weakness in weaknesses(password, name.as_deref().unwrap_or_default()) {
            fields.wrong("password", weakness.to_string());
        }
    }
    let role = match fields.string("role") {
        None => Role::User,
        Some(word) => Role::from_word(&word).unwrap_or_else(|| {
            fields.wrong("role", "must be user or admin");
            Role::User
        }),
    };
    let new = name.zip(password).map(|(name, password)| NewUser {
        name,
        password,
        role,
    });
    let new = fields.finish(new)?;
    let record = state
        .identity
        .register(new, caller.principal.as_ref())
        .await?;
    Ok((StatusCode::CREATED, Json(record.into())))
}

/// Log in
///
/// After five failures within an hour the account is locked for half an hour.
#[utoipa::path(
    post, path = "/api/v1/auth/login", operation_id = "logIn", tag = "accounts",
    request_body = LoginRequest,
    responses(
        (status = 200, description = "A token", body = TokenBody),
        (status = 400, description = "The body is no JSON object", body = ErrorBody),
        (status = 401, description = "The name or the password is wrong", body = ErrorBody),
        (status = 422, description = "A field is missing", body = ErrorBody),
        (status = 429, description = "Too many failures: locked, or too many at once",
            body = ErrorBody),
    ),
)]
pub async fn login(
    State(state): State<AppState>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let mut fields = Fields::parse(body)?;
    let name = fields.required("username", Fields::string);
    let password = fields.required("password", Fields::string);
    let (username, password) = fields.finish(name.zip(password))?;
    let result = state.identity.login(&username, password).await;
    let user = result.as_ref().ok().map(|(_, user)| user.id.to_string());
    let noted = LoggedIn {
        user_id: user,
        // What is no name is not written down: it may be a password.
        username: match check_name(&username) {
            Ok(()) => username,
            Err(_) => String::new(),
        },
    };
    let answer = result.map(|(access_token, _)| {
        Json(TokenBody {
            access_token,
            token_type: "bearer",
            expires_in: TOKEN_SECONDS,
        })
    });
    Ok((Extension(noted), answer.map_err(ApiError::from)).into_response())
}
