//! The API's description as a page, Swagger UI, at `/docs`. All of it is in this binary: nothing is
//! loaded from elsewhere, and [`super::headers`] has browsers see to it.

use axum::Router;
use utoipa_swagger_ui::{Config, SwaggerUi};

/// The page and what it loads.
pub fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    let config = Config::from("/openapi.json")
        // By default the page sends the description to a service that tells whether it is valid.
        .validator_url("none")
        .display_operation_id(true)
        .display_request_duration(true);
    SwaggerUi::new("/docs").config(config).into()
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::{Request, StatusCode};
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;

    async fn get(path: &str) -> (StatusCode, String, String) {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let response = router::<()>().oneshot(request).await.unwrap();
        let kind = response.headers().get("content-type").cloned();
        let kind = kind.map_or_else(String::new, |kind| kind.to_str().unwrap().to_owned());
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, kind, String::from_utf8_lossy(&body).into_owned())
    }

    /// What stands between `before` and the next quotation mark, wherever `before` does.
    fn after<'a>(text: &'a str, before: &str) -> Vec<&'a str> {
        text.split(before)
            .skip(1)
            .filter_map(|rest| rest.split('"').next())
            .collect()
    }

    #[tokio::test]
    async fn the_page_and_all_that_it_loads_come_from_here() {
        let (status, ..) = get("/docs").await;
        assert_eq!(status, StatusCode::SEE_OTHER);
        let (status, kind, page) = get("/docs/").await;
        assert_eq!(status, StatusCode::OK);
        assert!(kind.starts_with("text/html"), "{kind}");
        let mut loads = after(&page, "src=\"");
        loads.extend(after(&page, "href=\""));
        assert!(loads.len() >= 5, "{loads:?}");
        for name in loads {
            assert!(!name.contains(':') && !name.starts_with("//"), "{name}");
            let path = format!("/docs/{}", name.trim_start_matches("./"));
            let (status, kind, content) = get(&path).await;
            assert_eq!(status, StatusCode::OK, "{path}");
            assert!(!content.is_empty() && !kind.is_empty(), "{path}");
            if kind.starts_with("text/css") {
                for url in content.split("url(").skip(1) {
                    assert!(url.trim_start_matches('"').starts_with("data:"), "{path}");
                }
                assert!(!content.contains("@import"), "{path}");
            }
        }
        let (_, _, start) = get("/docs/swagger-initializer.js").await;
        assert!(start.contains("\"/openapi.json\""), "{start}");
        assert!(start.contains("\"validatorUrl\": \"none\""), "{start}");
        assert!(!start.contains("://"), "{start}");
    }
}
