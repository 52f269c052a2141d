//! `palyra journal`: reading and checking the record of every accepted action.

mod view;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use palyra_client::{Client, Step};
use palyra_proto::journal::v1::{Cursor, TailRequest, VerifyRequest};
use tokio::process::Command;

use crate::failure::{Failure, PROBLEMS, Result};
use crate::output::{Format, Out, Source, note};
use crate::session::Global;
use view::{OfflineView, RowView, VerifyView};

/// How many rows are shown when nothing else is asked for.
const LAST: u32 = 20;

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
    #[arg(short, long)]
    follow: bool,
    /// Begin at this place: INDEX or INDEX.ORDINAL
    #[arg(long, value_name = "CURSOR", value_parser = parse_cursor, conflicts_with = "last")]
    from: Option<Cursor>,
    /// Only the last rows; without it 20
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
            global.out().one(&view, source, &view.facts())?;
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
    let request = TailRequest {
        after: tail.from.map(before),
        follow: tail.follow,
        last: if tail.from.is_some() {
            0
        } else {
            tail.last.unwrap_or(LAST)
        },
        action_prefix: tail.action,
        subject: tail.subject,
        read: None,
    };
    // A tail that ends must not wait for ever for a cluster that isn't there; one that follows may.
    let patience = if tail.follow {
        global.timeout
    } else {
        Some(client.timeout())
    };
    let mut feed = client.follow(request, patience);
    let mut gathered = Vec::new();
    loop {
        match feed.next().await? {
            Step::Rows(rows) => {
                let rows = rows.into_iter().map(RowView::from);
                if !tail.follow && out.format == Format::Json {
                    gathered.extend(rows);
                    continue;
                }
                for row in rows {
                    if out.format.is_table() {
                        out.write(&row.line(out.format == Format::Wide))?
                    } else {
                        out.row(&row)?
                    }
                }
            }
            Step::Gap(first) => note(&format!(
                "rows before {}.{} are not kept any more",
                first.index, first.ordinal
            )),
            Step::Moved { endpoint, cause } => note(&format!("following at {endpoint} now ({cause})")),
            Step::End => break,
        }
    }
    if !tail.follow && out.format == Format::Json {
        out.list(&gathered, feed.read().into())?;
    }
    Ok(())
}

/// The check needs the database, which only `palyrad` can open: it is asked.
async fn verify_folder(out: Out, data_dir: PathBuf) -> Result {
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
