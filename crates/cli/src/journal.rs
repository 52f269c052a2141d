//! `palyra journal`: reading and checking the record of every accepted action.

mod view;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use palyra_client::{Client, Event, Follow, Step};
use palyra_proto::common::v1::ReadInfo;
use palyra_proto::journal::v1::{Cursor, StreamEventsRequest, TailRequest, VerifyRequest};
use tokio::process::Command;

use crate::failure::{Failure, PROBLEMS, Result};
use crate::output::{Format, Out, Source, note};
use crate::session::Global;
use crate::watch::tell;
use view::{OfflineView, RowView, VerifyView};

/// How many rows are shown when nothing else is asked for.
const LAST: u32 = 20;
/// How many last rows a replica is asked for; more are read from the beginning.
const LAST_ASKED: u32 = 1_000;

/// What can be done about the journal.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Prints rows, oldest first
    #[command(after_help = "Example:\n  palyra journal tail -f\n  \
                      palyra journal tail --from 88123 --action pairing. -o jsonl")]
    Tail(Tail),
    /// Recomputes the hash chain, on a replica or over a data folder; exit code 14 when it is broken
    #[command(
        after_help = "Example:\n  palyra journal verify\n  palyra journal verify --data-dir /backup/r1"
    )]
    Verify {
        /// A replica's data folder that no palyrad uses now, or a copy of one
        #[arg(long, value_name = "DIR")]
        data_dir: Option<PathBuf>,
    },
}

/// What is printed.
#[derive(Debug, Args)]
pub(crate) struct Tail {
    /// Go on with what happens, at another replica when one is lost
    #[arg(short, long, visible_alias = "watch", visible_short_alias = 'w')]
    follow: bool,
    /// Begin at this place: INDEX or INDEX.ORDINAL
    #[arg(long, value_name = "CURSOR", value_parser = parse_cursor, conflicts_with = "last")]
    from: Option<Cursor>,
    /// Only the last rows (of those that are asked for); without it 20
    #[arg(long, value_name = "COUNT")]
    last: Option<u32>,
    /// Only actions that begin so, for example "device."
    #[arg(long, value_name = "PREFIX", default_value = "", hide_default_value = true)]
    action: String,
    /// Only rows about this device, code, job or operator
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    subject: String,
}

fn parse_cursor(text: &str) -> std::result::Result<Cursor, String> {
    let bad = || format!("{text:?} is no cursor: write INDEX or INDEX.ORDINAL");
    let (index, ordinal) = text.split_once('.').unwrap_or((text, "0"));
    Ok(Cursor {
        index: index.parse().map_err(|_| bad())?,
        ordinal: ordinal.parse().map_err(|_| bad())?,
    })
}

/// The cursor before this one: feeds begin after the cursor that they are given.
fn before(cursor: Cursor) -> Cursor {
    match cursor.ordinal.checked_sub(1) {
        Some(ordinal) => Cursor {
            index: cursor.index,
            ordinal,
        },
        None => Cursor {
            index: cursor.index.saturating_sub(1),
            ordinal: u32::MAX,
        },
    }
}

/// Does what was asked about the journal.
pub(crate) async fn run(global: &Global, verb: Verb) -> Result {
    match verb {
        Verb::Verify {
            data_dir: Some(data_dir),
        } => return verify_folder(global.out(), data_dir).await,
        Verb::Verify { data_dir: None } => {
            let session = global.open()?;
            let answer = session.client.verify_journal(VerifyRequest::default()).await?;
            let source = Source::from(answer.read);
            let view = VerifyView::from(answer);
            global.out().one(&view, source, &view.facts(source.served_by))?;
            session.close().await;
            if !view.intact {
                return Err(Failure::Silent(PROBLEMS));
            }
        }
        Verb::Tail(tail) => {
            let session = global.open()?;
            print_rows(&session.client, global, tail).await?;
            session.close().await;
        }
    }
    Ok(())
}

async fn print_rows(client: &Client, global: &Global, tail: Tail) -> Result {
    let out = global.out();
    // A tail that ends must not wait for ever for a cluster that isn't there; one that follows may.
    let patience = if tail.follow {
        global.timeout
    } else {
        Some(client.timeout())
    };
    let mut request = TailRequest {
        after: tail.from.map(before),
        action_prefix: tail.action,
        subject: tail.subject,
        ..TailRequest::default()
    };
    if tail.from.is_some() {
        print_titles(out)?;
    } else {
        let newest = newest(client, &request, tail.last.unwrap_or(LAST), patience).await?;
        print_titles(out)?;
        if !tail.follow {
            return print_all(out, &newest.rows.into_iter().collect::<Vec<_>>(), newest.read);
        }
        for row in &newest.rows {
            print_row(out, row)?;
        }
        request.after = newest.end;
    }
    if tail.follow {
        return follow(client, out, request, patience).await;
    }
    let mut feed = client.follow(request, patience);
    let mut gathered = Vec::new();
    while let Some(rows) = next_rows(&mut feed).await? {
        if out.format == Format::Json {
            gathered.extend(rows);
            continue;
        }
        for row in &rows {
            print_row(out, row)?;
        }
    }
    if out.format == Format::Json {
        print_all(out, &gathered, feed.read())?;
    }
    Ok(())
}

/// Prints what happens from where `from` says, until the process is ended.
async fn follow(client: &Client, out: Out, from: TailRequest, patience: Option<Duration>) -> Result {
    let request = StreamEventsRequest {
        from_first: from.after.is_none(),
        after: from.after,
        action_prefix: from.action_prefix,
        subject: from.subject,
        ..StreamEventsRequest::default()
    };
    let mut feed = client.events(request, patience);
    loop {
        match feed.next().await? {
            Event::Rows(rows) => {
                for row in rows {
                    print_row(out, &RowView::from(row))?;
                }
            }
            Event::Gap { first, .. } => note(&missed(first)),
            event => tell(&event),
        }
    }
}

fn missed(first: Cursor) -> String {
    format!(
        "rows before {}.{} are not kept any more",
        first.index, first.ordinal
    )
}

/// The newest rows.
struct Newest {
    rows: VecDeque<RowView>,
    /// The last row that was seen, after which a feed goes on.
    end: Option<Cursor>,
    read: Option<ReadInfo>,
}

/// The last `keep` rows that `request` asks for. A replica counts its last rows before it filters them, so with
/// a filter the journal is read from its beginning.
async fn newest(
    client: &Client,
    request: &TailRequest,
    keep: u32,
    patience: Option<Duration>,
) -> Result<Newest> {
    let filtered = !request.action_prefix.is_empty() || !request.subject.is_empty();
    let last = if filtered || keep > LAST_ASKED {
        0
    } else {
        keep.max(1)
    };
    let request = TailRequest {
        follow: false,
        last,
        ..request.clone()
    };
    let keep = keep as usize;
    let mut rows = VecDeque::new();
    let mut feed = client.follow(request, patience);
    while let Some(more) = next_rows(&mut feed).await? {
        rows.extend(more);
        rows.drain(..rows.len().saturating_sub(keep));
    }
    Ok(Newest {
        rows,
        end: feed.cursor(),
        read: feed.read(),
    })
}

/// The next rows of a feed; nothing at its end.
async fn next_rows(feed: &mut Follow) -> Result<Option<Vec<RowView>>> {
    loop {
        match feed.next().await? {
            Step::Rows(rows) => return Ok(Some(rows.into_iter().map(RowView::from).collect())),
            Step::Gap(first) => note(&missed(first)),
            Step::End => return Ok(None),
            Step::Moved { endpoint, cause } => tell(&Event::Moved { endpoint, cause }),
            Step::Lost { cause } => tell(&Event::Lost { cause }),
        }
    }
}

fn print_titles(out: Out) -> Result {
    if out.format.is_table() {
        out.write(&RowView::titles(out.format == Format::Wide))?;
    }
    Ok(())
}

fn print_row(out: Out, row: &RowView) -> Result {
    if out.format.is_table() {
        return out.write(&row.line(out.format == Format::Wide));
    }
    out.row(row)
}

fn print_all(out: Out, rows: &[RowView], read: Option<ReadInfo>) -> Result {
    if out.format == Format::Json {
        return out.list(rows, read.into());
    }
    rows.iter().try_for_each(|row| print_row(out, row))
}

/// The check needs the database, which only `palyrad` can open: it is asked.
async fn verify_folder(out: Out, data_dir: PathBuf) -> Result {
    std::fs::metadata(&data_dir).map_err(|error| Failure::file("find", &data_dir, &error))?;
    let program = palyrad();
    let done = Command::new(&program)
        .arg("journal-verify")
        .arg("--data-dir")
        .arg(&data_dir)
        .args(["-o", "json"])
        .output();
    let done = done.await.map_err(|error| {
        let next = "put palyrad next to palyra, or on the PATH";
        let message = format!(
            "cannot run {}, which checks data folders: {error}",
            program.display()
        );
        Failure::local(palyra_client::Class::Unsupported, message, next)
    })?;
    match serde_json::from_slice::<OfflineView>(&done.stdout) {
        Ok(view) => {
            out.plain(&view, &crate::output::table::facts(&view.facts()))?;
            if view.intact {
                Ok(())
            } else {
                Err(Failure::Silent(PROBLEMS))
            }
        }
        Err(_) => {
            let words = String::from_utf8_lossy(&done.stderr);
            let cause = words.trim().trim_start_matches("palyrad: ");
            let cause = if cause.is_empty() {
                "palyrad said nothing"
            } else {
                cause
            };
            let message = format!(
                "the journal in {} could not be checked: {cause}",
                data_dir.display()
            );
            let next = "give the data folder of a replica that does not run, or a copy of one";
            Err(Failure::local(palyra_client::Class::Precondition, message, next))
        }
    }
}

/// `palyrad` next to this program, or whatever the PATH finds.
fn palyrad() -> PathBuf {
    let beside = std::env::current_exe()
        .ok()
        .map(|path| path.with_file_name("palyrad"));
    beside
        .filter(|path| path.is_file())
        .unwrap_or_else(|| PathBuf::from("palyrad"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_are_read_and_stepped_back() {
        assert_eq!(parse_cursor("7").unwrap(), Cursor { index: 7, ordinal: 0 });
        assert_eq!(parse_cursor("7.2").unwrap(), Cursor { index: 7, ordinal: 2 });
        assert!(parse_cursor("7.").is_err() && parse_cursor("x").is_err());
        assert_eq!(
            before(Cursor { index: 7, ordinal: 2 }),
            Cursor { index: 7, ordinal: 1 }
        );
        assert_eq!(
            before(Cursor { index: 7, ordinal: 0 }),
            Cursor {
                index: 6,
                ordinal: u32::MAX
            }
        );
    }
}
