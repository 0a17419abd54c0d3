//! The description of the API, made from the code that serves it.

use utoipa::OpenApi;
use utoipa::openapi::security::{
    ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme,
};

use super::HealthBody;
use crate::dialects::{microvm, wrenn};

/// The description cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("the API's description cannot be written: {0}")]
pub struct OpenApiError(String);

/// What the document calls a key, in the header `X-API-Key`.
const KEY: &str = "apiKey";
/// What the document calls a token, in the header `Authorization`.
const TOKEN: &str = "bearer";

#[derive(OpenApi)]
#[openapi(
    info(
        title = "MicroVM Sandbox API",
        description = "Runs each untrusted program in a virtual machine of its own.",
    ),
    servers(
        (url = "/", description = "Where this is from"),
        (url = "http://localhost:8080", description = "This machine"),
        (url = "http://localhost:8000", description = "This machine"),
    ),
    paths(super::health, super::metrics::metrics),
    components(schemas(HealthBody)),
)]
struct Service;

/// The description, OpenAPI 3.1.
pub fn document() -> utoipa::openapi::OpenApi {
    let mut document = Service::openapi();
    document.merge(wrenn::document());
    document.merge(microvm::document());
    let key = ApiKey::Header(ApiKeyValue::new("X-API-Key"));
    let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer);
    let components = document.components.get_or_insert_default();
    components.add_security_scheme(KEY, SecurityScheme::ApiKey(key));
    components.add_security_scheme(TOKEN, SecurityScheme::Http(bearer.build()));
    // Whether they are needed is the daemon's settings' to say.
    document.security = Some(vec![
        SecurityRequirement::default(),
        SecurityRequirement::new::<_, [&str; 0], _>(KEY, []),
        SecurityRequirement::new::<_, [&str; 0], _>(TOKEN, []),
    ]);
    document
}

/// The description as YAML.
///
/// # Errors
/// It cannot be written.
pub fn yaml() -> Result<String, OpenApiError> {
    document()
        .to_yaml()
        .map_err(|error| OpenApiError(error.to_string()))
}

/// The description as JSON.
///
/// # Errors
/// It cannot be written.
pub fn json() -> Result<String, OpenApiError> {
    document()
        .to_pretty_json()
        .map_err(|error| OpenApiError(error.to_string()))
}
