//! The description of the API, made from the code that serves it.

use utoipa::OpenApi;

use super::HealthBody;
use crate::dialects::{microvm, wrenn};

/// The description cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("the API's description cannot be written: {0}")]
pub struct OpenApiError(String);

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
    paths(super::health),
    components(schemas(HealthBody)),
)]
struct Service;

/// The description, OpenAPI 3.1.
pub fn document() -> utoipa::openapi::OpenApi {
    let mut document = Service::openapi();
    document.merge(wrenn::document());
    document.merge(microvm::document());
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
