//! Reading JSON bodies: what is wrong with one is told at once.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use serde_json::{Map, Value};

use super::error::{ApiError, FieldError};
use crate::domain::check_variable;

/// The most errors of a body that are told; the others are counted.
const MAX_TOLD: usize = 32;

/// The fields of a JSON object. What is read and makes no sense is noted, and told by
/// [`Fields::finish`]; a field that is missing or null is not there, and unknown ones do not matter.
#[derive(Debug, Default)]
pub struct Fields {
    fields: Map<String, Value>,
    /// Names of what these are in, each with a dot behind.
    within: String,
    /// No two are the same.
    errors: Vec<FieldError>,
    /// How many there are beside these.
    untold: usize,
}

impl Fields {
    /// The fields of a body.
    ///
    /// # Errors
    /// It is too large, or no JSON object.
    pub fn parse(body: Result<Bytes, BytesRejection>) -> Result<Self, ApiError> {
        let body = body.map_err(|rejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => ApiError::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "payload_too_large",
                "the JSON body is larger than 1 MiB",
            ),
            _ => ApiError::bad_request("the body broke off"),
        })?;
        match serde_json::from_slice(&body) {
            Ok(Value::Object(fields)) => Ok(Self {
                fields,
                ..Self::default()
            }),
            Ok(_) => Err(ApiError::bad_request("the body must be a JSON object")),
            Err(error) => Err(ApiError::bad_request(format!(
                "the body must be a JSON object: {error}"
            ))),
        }
    }

    /// The same, with no fields if there is no body.
    ///
    /// # Errors
    /// As there.
    pub fn parse_optional(body: Result<Bytes, BytesRejection>) -> Result<Self, ApiError> {
        match body {
            Ok(body) if body.is_empty() => Ok(Self::default()),
            body => Self::parse(body),
        }
    }

    /// Notes that a field makes no sense. A body may have any number of reasons for that.
    pub fn wrong(&mut self, field: &str, error: impl Into<String>) {
        let error = FieldError::new(format!("{}{field}", self.within), error);
        if self.errors.contains(&error) {
            return;
        }
        match self.errors.len() < MAX_TOLD {
            true => self.errors.push(error),
            false => self.untold = self.untold.saturating_add(1),
        }
    }

    /// A field that must be there; what its reader says if it is missing is that it is required.
    pub fn required<T>(
        &mut self,
        field: &str,
        read: impl FnOnce(&mut Self, &str) -> Option<T>,
    ) -> Option<T> {
        if self.fields.get(field).is_none_or(Value::is_null) {
            self.wrong(field, "is required");
            return None;
        }
        read(self, field)
    }

    /// A string.
    pub fn string(&mut self, field: &str) -> Option<String> {
        match self.fields.get(field) {
            Some(Value::String(text)) => Some(text.clone()),
            other => self.not_a(
                field,
                other.is_some_and(|value| !value.is_null()),
                "a string",
            ),
        }
    }

    /// A boolean.
    pub fn boolean(&mut self, field: &str) -> Option<bool> {
        match self.fields.get(field) {
            Some(Value::Bool(value)) => Some(*value),
            other => {
                let is_there = other.is_some_and(|value| !value.is_null());
                self.not_a(field, is_there, "true or false")
            }
        }
    }

    /// An integer within these bounds.
    pub fn integer(&mut self, field: &str, bounds: RangeInclusive<i64>) -> Option<i64> {
        let value = self.fields.get(field).filter(|value| !value.is_null())?;
        match value.as_i64() {
            Some(number) if bounds.contains(&number) => Some(number),
            Some(_) => {
                let (least, most) = (bounds.start(), bounds.end());
                self.wrong(field, format!("must be between {least} and {most}"));
                None
            }
            None => self.not_a(field, true, "an integer"),
        }
    }

    /// Strings by their names.
    pub fn strings(&mut self, field: &str) -> Option<Vec<(String, String)>> {
        self.object(field, |fields| {
            let names: Vec<_> = fields.fields.keys().cloned().collect();
            let each = names.into_iter().map(|name| {
                let value = fields.string(&name)?;
                Some((name, value))
            });
            // Those that are no strings have been noted.
            each.collect::<Vec<_>>().into_iter().flatten().collect()
        })
    }

    /// A string that `check` admits, or says in a sentence why not.
    pub fn checked(
        &mut self,
        field: &str,
        check: impl FnOnce(&str) -> Result<(), String>,
    ) -> Option<String> {
        let text = self.string(field)?;
        if let Err(problem) = check(&text) {
            self.wrong(field, problem);
        }
        Some(text)
    }

    /// The environment of a command.
    pub fn variables(&mut self, field: &str) -> Option<BTreeMap<String, String>> {
        let variables = self.strings(field)?;
        for (name, value) in &variables {
            if let Err(problem) = check_variable(name, value) {
                self.wrong(field, problem);
            }
        }
        Some(variables.into_iter().collect())
    }

    /// What `read` makes of the fields of an object.
    pub fn object<T>(&mut self, field: &str, read: impl FnOnce(&mut Self) -> T) -> Option<T> {
        match self.fields.get(field) {
            Some(Value::Object(fields)) => {
                let mut inner = Self {
                    fields: fields.clone(),
                    within: format!("{}{field}.", self.within),
                    errors: std::mem::take(&mut self.errors),
                    untold: self.untold,
                };
                let value = read(&mut inner);
                self.errors = inner.errors;
                self.untold = inner.untold;
                Some(value)
            }
            other => {
                let is_there = other.is_some_and(|value| !value.is_null());
                self.not_a(field, is_there, "an object")
            }
        }
    }

    /// A list of strings.
    pub fn list(&mut self, field: &str) -> Option<Vec<String>> {
        let Some(Value::Array(values)) = self.fields.get(field) else {
            let is_there = self.fields.get(field).is_some_and(|value| !value.is_null());
            return self.not_a(field, is_there, "a list of strings");
        };
        let strings = values.iter().map(|value| value.as_str().map(str::to_owned));
        match strings.collect::<Option<_>>() {
            Some(strings) => Some(strings),
            None => self.not_a(field, true, "a list of strings"),
        }
    }

    /// Any value.
    pub fn value(&mut self, field: &str) -> Option<Value> {
        let value = self.fields.get(field)?;
        (!value.is_null()).then(|| value.clone())
    }

    /// The answer that tells what was noted.
    pub fn into_error(self) -> ApiError {
        ApiError::validation(&self.errors, self.untold)
    }

    fn not_a<T>(&mut self, field: &str, is_there: bool, what: &str) -> Option<T> {
        if is_there {
            self.wrong(field, format!("must be {what}"));
        }
        None
    }

    /// What was read, if nothing was wrong.
    ///
    /// # Errors
    /// Something was, or `value` is `None`, which it is only then.
    pub fn finish<T>(self, value: Option<T>) -> Result<T, ApiError> {
        match value {
            Some(value) if self.errors.is_empty() => Ok(value),
            _ => Err(self.into_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(body: &Value) -> Fields {
        Fields::parse(Ok(Bytes::from(body.to_string()))).unwrap()
    }

    #[test]
    fn all_that_is_wrong_is_told() {
        let mut fields = of(&json!({
            "name": 1, "vcpus": 17, "memory_mb": 1.5, "force": "yes", "label": null,
            "storage": {"size": 0, "kind": []}, "network": "none", "env": {"A": "1", "B": 2},
        }));
        assert_eq!(fields.string("name"), None);
        assert_eq!(fields.integer("vcpus", 1..=16), None);
        assert_eq!(fields.integer("memory_mb", 1..=16), None);
        assert_eq!(fields.boolean("force"), None);
        assert_eq!(fields.string("label"), None);
        assert_eq!(fields.required("label", Fields::string), None);
        assert_eq!(fields.required("missing", Fields::string), None);
        let size = |fields: &mut Fields| (fields.integer("size", 1..=9), fields.string("kind"));
        assert_eq!(fields.object("storage", size), Some((None, None)));
        assert_eq!(fields.object("network", size), None);
        assert_eq!(
            fields.strings("env"),
            Some(vec![("A".to_owned(), "1".to_owned())])
        );
        let told: Vec<_> = fields
            .errors
            .iter()
            .map(|error| format!("{} {}", error.field, error.error))
            .collect();
        assert_eq!(
            told,
            [
                "name must be a string",
                "vcpus must be between 1 and 16",
                "memory_mb must be an integer",
                "force must be true or false",
                "label is required",
                "missing is required",
                "storage.size must be between 1 and 9",
                "storage.kind must be a string",
                "network must be an object",
                "env.B must be a string",
            ]
        );
        assert!(fields.finish(Some(())).is_err());
    }

    #[test]
    fn what_is_told_does_not_grow_with_the_body() {
        let mut fields = of(&json!({"env": {"K".repeat(1 << 10): 1}}));
        for _ in 0..100_000 {
            fields.wrong("frameworks", "must be of these");
        }
        fields.wrong("name", "x".repeat(1 << 20));
        fields.strings("env");
        assert_eq!(fields.errors.len(), 3);
        let first: Vec<_> = fields.errors.iter().map(|it| it.field.len()).collect();
        assert_eq!(first, ["frameworks".len(), "name".len(), 127]);
        for number in 0..1000 {
            fields.wrong(&number.to_string(), "must be a string");
        }
        assert_eq!((fields.errors.len(), fields.untold), (MAX_TOLD, 971));
        let longest = fields.errors.iter().map(|it| it.error.len()).max();
        assert!(longest.is_some_and(|length| length <= 512), "{longest:?}");
        fields.object("env", |env| env.wrong("A", "must be a string"));
        assert_eq!((fields.errors.len(), fields.untold), (MAX_TOLD, 972));
    }

    #[test]
    fn what_is_right_is_read() {
        let mut fields = of(&json!({"name": "n", "vcpus": 16, "force": false, "more": {}}));
        assert_eq!(fields.required("name", Fields::string), Some("n".into()));
        assert_eq!(fields.integer("vcpus", 1..=16), Some(16));
        assert_eq!(fields.boolean("force"), Some(false));
        assert_eq!(fields.value("more"), Some(json!({})));
        assert_eq!(fields.integer("missing", 1..=16), None);
        assert!(fields.finish(Some(())).is_ok());
        for body in ["", "[]", "1", "{", "{\"a\":1}x"] {
            assert!(Fields::parse(Ok(body.into())).is_err(), "{body}");
        }
        assert!(Fields::parse_optional(Ok(Bytes::new())).is_ok());
    }
}
