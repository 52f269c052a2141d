//! The lists of revoked certificates over plain HTTP, on the listener for metrics and health: what is signed needs no
//! TLS.
//!
//! `GET /crl` lists them, `/crl/<name>.crl` is one in DER, `/crl/<name>.pem` in PEM. Names are `r1-2` for the second
//! authority of replica 1, `root-1` for the first root. Every replica serves all.

use std::fmt::Write as _;
use std::sync::Arc;

use axum::Router;
use axum::extract::Path;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use palyra_state::ca::Crl;

/// Where the lists come from.
pub(crate) type Lists = Arc<dyn Fn() -> Vec<Crl> + Send + Sync>;

/// The routes.
pub(crate) fn routes(lists: Lists) -> Router {
    let all = Arc::clone(&lists);
    Router::new()
        .route("/crl", get(async move || listing(&all())))
        .route(
            "/crl/{file}",
            get(async move |Path(file): Path<String>| answer(&lists(), &file)),
        )
}

fn name(crl: &Crl) -> String {
    match crl.replica_id {
        0 => format!("root-{}", crl.number),
        replica => format!("r{replica}-{}", crl.number),
    }
}

fn listing(lists: &[Crl]) -> Response {
    let mut text = String::from("# path number entries left_out this_update_ms next_update_ms\n");
    for crl in lists {
        let _ = writeln!(
            text,
            "/crl/{}.crl {} {} {} {} {}",
            name(crl),
            crl.crl_number,
            crl.entries,
            crl.left_out,
            crl.this_update,
            crl.next_update
        );
    }
    ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response()
}

fn answer(lists: &[Crl], file: &str) -> Response {
    let (wanted, form) = file.rsplit_once('.').unwrap_or((file, ""));
    let found = lists.iter().find(|crl| name(crl) == wanted);
    match (found, form) {
        (Some(crl), "crl") => {
            let kind = [(header::CONTENT_TYPE, "application/pkix-crl")];
            (kind, crl.der.clone()).into_response()
        }
        (Some(crl), "pem") => {
            let kind = [(header::CONTENT_TYPE, "application/x-pem-file")];
            (kind, palyra_pki::layout::crl_to_pem(&crl.der)).into_response()
        }
        _ => (
            StatusCode::NOT_FOUND,
            "there is no such list; GET /crl names those that there are\n",
        )
            .into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_named_after_who_signed_them() {
        let mut crl = Crl {
            replica_id: 3,
            number: 2,
            ..Crl::default()
        };
        assert_eq!(name(&crl), "r3-2");
        crl.replica_id = 0;
        assert_eq!(name(&crl), "root-2");
        assert_eq!(answer(&[crl.clone()], "root-2.crl").status(), StatusCode::OK);
        assert_eq!(answer(&[crl.clone()], "root-2.pem").status(), StatusCode::OK);
        for file in ["root-2", "root-3.crl", "r3-2.crl", "../root-2.crl"] {
            assert_eq!(
                answer(&[crl.clone()], file).status(),
                StatusCode::NOT_FOUND,
                "{file}"
            );
        }
    }
}
