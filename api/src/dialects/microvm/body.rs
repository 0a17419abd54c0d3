//! Bodies of requests.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;

use super::error::ApiError;
use super::fields::Fields;

/// A request whose fields are read from a JSON object.
pub trait FromFields {
    /// Reads them. What makes no sense is noted in `fields`.
    fn read(fields: &mut Fields) -> Self;
}

/// The request in a body; without a body, one without fields.
///
/// # Errors
/// It is no JSON object, or fields of it make no sense.
pub fn parse<T: FromFields>(body: Result<Bytes, BytesRejection>) -> Result<T, ApiError> {
    let mut fields = Fields::parse_optional(body)?;
    let request = T::read(&mut fields);
    fields.finish(Some(request))
}
