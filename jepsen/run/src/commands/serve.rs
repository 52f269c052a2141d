//! `jepsen serve`: a page on this machine that lists runs, with links to their files and timelines.
//!
//! Invariants: it listens on loopback only; it serves files below the folder that it was given, and no others,
//! whatever a request or a link says.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::cli::{ServeArgs, Usage};
use crate::judge::Results;

/// A request is at most so long.
const MAX_REQUEST: usize = 8 << 10;

/// Serves until it is ended.
///
/// # Errors
/// When it can't listen.
pub fn main(args: &ServeArgs) -> Result<u8> {
    let root = args.folder.canonicalize().map_err(|_| {
        Usage(format!(
            "there is no folder {}; name the one of --store",
            args.folder.display()
        ))
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(("127.0.0.1", args.port))
            .await
            .with_context(|| format!("port {} on 127.0.0.1: choose another with --port", args.port))?;
        println!("http://{}/", listener.local_addr()?);
        let root = Arc::new(root);
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let (stream, _) = accepted?;
                    let root = Arc::clone(&root);
                    // Who hangs up in the middle has seen enough.
                    tokio::spawn(async move { drop(answer(stream, &root).await) });
                }
                _ = tokio::signal::ctrl_c() => return Ok(0),
            }
        }
    })
}

async fn answer(mut stream: TcpStream, root: &Path) -> Result<()> {
    let mut request = Vec::new();
    let mut piece = [0u8; 1024];
    while !request.windows(4).any(|window| window == b"\r\n\r\n") && request.len() < MAX_REQUEST {
        match stream.read(&mut piece).await? {
            0 => break,
            count => request.extend_from_slice(&piece[..count]),
        }
    }
    let request = String::from_utf8_lossy(&request).into_owned();
    let mut words = request.split_whitespace();
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or("/"));
    let (status, kind, body) = if method == "GET" {
        page(root, path)
    } else {
        refuse("405 Method Not Allowed")
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nX-Content-Type-Options: nosniff\r\n\
         Connection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(&body).await?;
    Ok(())
}

type Page = (&'static str, &'static str, Vec<u8>);

fn refuse(status: &'static str) -> Page {
    (
        status,
        "text/plain; charset=utf-8",
        format!("{status}\n").into_bytes(),
    )
}

fn page(root: &Path, path: &str) -> Page {
    let path = path.split(['?', '#']).next().unwrap_or("/");
    let Some(file) = below(root, path) else {
        return refuse("404 Not Found");
    };
    if file.is_dir() {
        let body = if path == "/" {
            runs(root)
        } else {
            files(&file, path)
        };
        return ("200 OK", "text/html; charset=utf-8", body.into_bytes());
    }
    match std::fs::read(&file) {
        Ok(bytes) => ("200 OK", kind_of(&file), bytes),
        Err(_) => refuse("404 Not Found"),
    }
}

/// The file that a path names, when it is below the root.
fn below(root: &Path, path: &str) -> Option<PathBuf> {
    let file = root.join(path.trim_start_matches('/')).canonicalize().ok()?;
    file.starts_with(root).then_some(file)
}

fn kind_of(file: &Path) -> &'static str {
    match file.extension().and_then(|ending| ending.to_str()) {
        Some("html") => "text/html; charset=utf-8",
        Some("json") => "application/json",
        Some("xml") => "application/xml",
        _ => "text/plain; charset=utf-8",
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

const STYLE: &str = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>\
    <title>jepsen</title><style>:root{color-scheme:light dark}body{font:15px/1.5 system-ui;margin:2rem auto;\
    max-width:70rem;padding:0 1rem}table{border-collapse:collapse;width:100%}td,th{text-align:left;\
    padding:.3rem .6rem;border-bottom:1px solid #8884}\
    .PASS{color:#2a8a3e}.FAIL{color:#d0342c;font-weight:600}.UNKNOWN{color:#b07800}</style>";

/// All runs, the newest first.
fn runs(root: &Path) -> String {
    let mut found: Vec<(String, Option<Results>)> = Vec::new();
    for name in folders(root) {
        for run in folders(&root.join(&name)) {
            let folder = root.join(&name).join(&run);
            let text = std::fs::read_to_string(folder.join("results.json")).ok();
            let results = text.and_then(|text| serde_json::from_str(&text).ok());
            if results.is_some() || folder.join("plan.jsonl").exists() {
                found.push((format!("{name}/{run}"), results));
            }
        }
    }
    found.sort_by(|one, other| other.0.rsplit('/').next().cmp(&one.0.rsplit('/').next()));
    let mut body = format!(
        "{STYLE}<h1>Runs</h1><table><tr><th>run<th>verdict<th>nemeses<th>ops<th>longest gap<th>first"
    );
    for (path, results) in found {
        let path = escape(&path);
        let _ = write!(body, "<tr><td><a href=\"/{path}\">{path}</a>");
        let Some(results) = results else {
            let _ = write!(body, "<td class=UNKNOWN>did not end<td><td><td><td>");
            continue;
        };
        let line = results.line();
        let word = line.split(' ').next().unwrap_or_default().to_owned();
        let first = line
            .split_once(" first: ")
            .or_else(|| line.split_once(" why: "))
            .map_or("", |(_, rest)| rest);
        let _ = write!(
            body,
            "<td class={word}>{word}<td>{}<td>{}<td>{:.1} s<td>{}",
            escape(&results.nemesis.join(", ")),
            results.ops.all,
            results.gap_max_ms as f64 / 1e3,
            escape(first)
        );
    }
    body + "</table>"
}

fn folders(of: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(of).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// The files of a folder.
fn files(folder: &Path, path: &str) -> String {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    let path = escape(path.trim_end_matches('/'));
    let mut body = format!("{STYLE}<p><a href=\"/\">all runs</a><h1>{path}</h1><ul>");
    for name in names {
        let name = escape(&name);
        let _ = write!(body, "<li><a href=\"{path}/{name}\">{name}</a>");
    }
    body + "</ul>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_above_the_folder_is_served() {
        let outside = tempfile::tempdir().unwrap();
        let root = outside.path().join("store");
        std::fs::create_dir_all(root.join("registry/1-7")).unwrap();
        std::fs::write(outside.path().join("secret"), "x").unwrap();
        std::fs::write(root.join("registry/1-7/plan.jsonl"), "{}").unwrap();
        std::os::unix::fs::symlink(outside.path().join("secret"), root.join("registry/link")).unwrap();
        let root = root.canonicalize().unwrap();
        for path in [
            "/../secret",
            "/registry/../../secret",
            "/registry/link",
            "//etc/passwd",
            "/nothing",
        ] {
            assert!(page(&root, path).0.starts_with("404"), "{path}");
        }
        assert_eq!(page(&root, "/registry/1-7/plan.jsonl").2, b"{}");
        let list = String::from_utf8(page(&root, "/").2).unwrap();
        assert!(list.contains("registry/1-7") && list.contains("did not end"));
    }

    #[test]
    fn names_can_not_become_markup() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("<b>"), "").unwrap();
        assert!(files(root.path(), "/x").contains("&lt;b&gt;"));
    }
}
