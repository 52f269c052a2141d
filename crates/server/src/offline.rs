//! What `palyrad` does with a data folder that no replica runs on: `journal-verify`.
//!
//! Nothing here listens, joins or votes. Opening a folder replays its write-ahead log, so a folder under
//! investigation is best copied first; the folder's lock keeps two processes apart.

use std::ops::ControlFlow;
use std::path::Path;

use palyra_pki::layout;
use palyra_replica::View;
use palyra_state::{Cursor, journal};
use palyra_storage::{Engine, EngineError, Family, Options, RocksEngine, Snapshot};
use serde_json::json;

use crate::exit::{Code, Failure};

/// Checks the journal of a data folder and prints the verdict, as JSON or as a sentence.
///
/// # Errors [`Code::Precondition`] when the folder cannot be opened, [`Code::Problems`] when its journal is
/// not intact.
pub(crate) fn verify_journal(data_dir: &Path, as_json: bool) -> Result<(), Failure> {
    let db = data_dir.join(layout::DB);
    if !db.is_dir() {
        let message = format!(
            "{} is no data folder of a replica: it has no {}",
            data_dir.display(),
            layout::DB
        );
        return Err(Failure::new(Code::Precondition, message));
    }
    let verdict = match examine(&db) {
        Ok(verdict) => verdict,
        Err(error @ EngineError::Corrupt { .. }) => Err((None, error.to_string())),
        Err(error) => return Err(Failure::new(Code::Precondition, error)),
    };
    report(verdict, as_json)
}

type Verdict = Result<journal::Summary, (Option<Cursor>, String)>;

fn examine(db: &Path) -> Result<Verdict, EngineError> {
    let engine = RocksEngine::open(db, Options::default())?;
    // Reads every block with its checksum: from here on nothing can fail halfway. The log too: the same text stands
    // in it, and a verdict over a folder must not overlook a change anywhere in it.
    for family in Family::ALL {
        engine.scan(family, &[], &[0xff; 8], &mut |_, _| ControlFlow::Continue(()))?;
    }
    let pinned: &dyn Engine = &engine;
    let view = match View::of(pinned) {
        Ok(view) => view,
        Err(error) => return Ok(Err((None, error.to_string()))),
    };
    Ok(journal::verify_all(&view).map_err(|broken| (Some(broken.cursor), broken.to_string())))
}

fn report(verdict: Verdict, as_json: bool) -> Result<(), Failure> {
    let place = |cursor: Cursor| json!({ "index": cursor.index, "ordinal": cursor.ordinal });
    let (value, sentence, intact) = match verdict {
        Ok(summary) => (
            json!({
                "intact": true,
                "rows": summary.rows,
                "first": place(summary.first),
                "last": place(summary.last),
                "head": summary.head.to_string(),
            }),
            format!(
                "the journal is intact: {} rows, head {}",
                summary.rows, summary.head
            ),
            true,
        ),
        Err((cursor, problem)) => (
            json!({ "intact": false, "broken_at": cursor.map(place), "problem": problem }),
            format!("the journal is BROKEN: {problem}"),
            false,
        ),
    };
    println!("{}", if as_json { value.to_string() } else { sentence });
    if intact {
        Ok(())
    } else {
        Err(Failure::new(Code::Problems, "the journal is not intact"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_none_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let failure = verify_journal(dir.path(), true).unwrap_err();
        assert!(failure.to_string().contains("no data folder"), "{failure}");
    }

    #[test]
    fn an_empty_journal_is_intact_and_a_flipped_byte_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let db = dir.path().join(layout::DB);
        {
            let engine = RocksEngine::open(&db, Options::default()).unwrap();
            let mut batch = palyra_storage::Batch::new();
            // Under a tag that no table has: bytes that nobody decodes.
            batch.put(Family::State, vec![0, 0, 0, 0, 0xfe], vec![7; 4096]);
            engine.write(batch).unwrap();
            engine.sync().unwrap();
        }
        verify_journal(dir.path(), false).unwrap();
        flip_a_byte(&db);
        assert!(verify_journal(dir.path(), true).is_err());
    }

    /// Flips a byte in the middle of the largest file that holds data.
    fn flip_a_byte(db: &Path) {
        let data = |name: &str| name.ends_with(".sst") || name.ends_with(".log");
        let mut files: Vec<_> = std::fs::read_dir(db)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.retain(|path| data(&path.to_string_lossy()));
        files.sort_by_key(|path| std::fs::metadata(path).unwrap().len());
        let path = files.last().unwrap();
        let mut bytes = std::fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }
}
