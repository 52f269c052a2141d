//! `palyra job logs`, and what `palyra node invoke --follow` shows: the lines of a running program.
//!
//! What never lives here: which replica has them (the cluster's business). Invariants: lines are shown in their order
//! and once; what is missing is said, with its count; a replica that goes away costs a pause and no error.

use std::time::Duration;

use palyra_proto::dispatch::v1::{DispatchInfo, LogLine, LogsRequest, LogsResponse, ProgressInfo};
use serde::Serialize;
use tokio::time::Instant;

use super::is_over;
use crate::failure::Result;
use crate::output::time::{Moment, millis};
use crate::output::{Out, note};
use crate::session::Global;

/// How long one question waits for news.
const WAIT_MS: u32 = 10_000;
/// How long `logs -f` goes on when nothing is said: as long as a dispatch may last.
const FOLLOW: Duration = Duration::from_secs(24 * 3600);

/// What there is to show.
pub(crate) enum Seen<'a> {
    Line(&'a LogLine),
    /// So many lines are missing here.
    Dropped(u64),
    Progress(&'a ProgressInfo),
    /// The dispatch is in another state.
    State(&'a DispatchInfo),
}

/// How following ended.
pub(crate) enum Ended {
    /// The dispatch has ended, and everything was shown.
    Over(Box<DispatchInfo>),
    /// The time was up.
    Time,
}

/// Shows what comes until the dispatch has ended and nothing more comes, or until the time is up.
pub(crate) async fn follow(
    ask: impl AsyncFn(LogsRequest) -> Result<LogsResponse>,
    id: &str,
    until: Instant,
    mut show: impl FnMut(Seen<'_>) -> Result,
) -> Result<Ended> {
    let mut reader = Reader::default();
    loop {
        let left = millis(until.saturating_duration_since(Instant::now()));
        let wait_ms = u32::try_from(left.min(WAIT_MS.into())).unwrap_or(WAIT_MS);
        let asked = ask(reader.ask(id, wait_ms));
        let Ok(answer) = tokio::time::timeout_at(until + super::ANSWER_GRACE, asked).await else {
            return Ok(Ended::Time);
        };
        let answer = answer?;
        let dispatch = answer.dispatch.unwrap_or_default();
        let news = reader.show(&dispatch, &answer.lines, answer.progress.as_ref(), &mut show)?;
        // An answer that brings an end may leave lines for one more question.
        if is_over(&dispatch.state) && !news {
            return Ok(Ended::Over(Box::new(dispatch)));
        }
        if left == 0 {
            return Ok(Ended::Time);
        }
    }
}

/// What a reader has seen.
#[derive(Default)]
struct Reader {
    attempt: u32,
    line: u64,
    progress: Option<(u32, Option<u32>, String)>,
    state: String,
}

impl Reader {
    fn ask(&self, id: &str, wait_ms: u32) -> LogsRequest {
        LogsRequest {
            id: id.to_owned(),
            attempt: self.attempt,
            line: self.line,
            wait_ms,
        }
    }

    /// Shows what is new; whether there was a line.
    fn show(
        &mut self,
        dispatch: &DispatchInfo,
        lines: &[LogLine],
        progress: Option<&ProgressInfo>,
        show: &mut impl FnMut(Seen<'_>) -> Result,
    ) -> Result<bool> {
        if !self.state.is_empty() && self.state != dispatch.state {
            show(Seen::State(dispatch))?;
        }
        self.state.clone_from(&dispatch.state);
        for line in lines {
            let expected = if line.attempt == self.attempt {
                self.line + 1
            } else {
                1
            };
            if line.line > expected {
                show(Seen::Dropped(line.line - expected))?;
            }
            (self.attempt, self.line) = (line.attempt, line.line);
            show(Seen::Line(line))?;
        }
        let said = progress.map(|said| (said.attempt, said.percent, said.message.clone()));
        if said != self.progress
            && let Some(progress) = progress
        {
            show(Seen::Progress(progress))?;
            self.progress = said;
        }
        Ok(!lines.is_empty())
    }
}

/// Tells on stderr that somebody has to act, or that the job is on its way again.
pub(crate) fn told(dispatch: &DispatchInfo) {
    if let Some(words) = waiting_words(dispatch) {
        note(&words);
    }
}

/// Who has to act, where, and how.
fn waiting_words(dispatch: &DispatchInfo) -> Option<String> {
    let waits = dispatch.mediation.as_ref()?;
    let host = if waits.host.is_empty() {
        "its machine"
    } else {
        &waits.host
    };
    Some(format!(
        "waits for the person at {host} (node {}) since {}: {}\n  there: {}",
        waits.device,
        Moment(waits.since_ms).told(palyra_client::wall_ms()),
        waits.prompt,
        waits.command,
    ))
}

/// How progress is told.
fn progress_words(progress: &ProgressInfo) -> String {
    let percent = progress.percent.map(|percent| format!("{percent}%"));
    let words = [percent.unwrap_or_default(), progress.message.clone()];
    words.join(" ").trim().to_owned()
}

/// What [`follow`] shows, told on stderr.
pub(crate) fn tell(seen: &Seen<'_>) {
    match seen {
        Seen::Line(line) => note(&line.text),
        Seen::Dropped(count) => note(&format!("… {count} lines are missing …")),
        Seen::Progress(progress) => note(&format!("» {}", progress_words(progress))),
        Seen::State(dispatch) if dispatch.mediation.is_some() => told(dispatch),
        Seen::State(_) => {}
    }
}

#[derive(Serialize)]
struct LineView<'a> {
    attempt: u32,
    line: u64,
    text: &'a str,
}

#[derive(Serialize)]
struct ProgressView<'a> {
    attempt: u32,
    percent: Option<u32>,
    progress: &'a str,
}

/// One line for each thing to show: text for people, JSON for programs.
fn print(out: Out, seen: &Seen<'_>) -> Result {
    if out.format.is_table() {
        if let Seen::Line(line) = seen {
            return out.write(&format!("{}\n", line.text));
        }
        tell(seen);
        return Ok(());
    }
    let json = |text: serde_json::Result<String>| {
        let text = text.unwrap_or_default();
        out.write(&format!("{text}\n"))
    };
    match seen {
        Seen::Line(line) => json(serde_json::to_string(&LineView {
            attempt: line.attempt,
            line: line.line,
            text: &line.text,
        })),
        Seen::Progress(progress) => json(serde_json::to_string(&ProgressView {
            attempt: progress.attempt,
            percent: progress.percent,
            progress: &progress.message,
        })),
        Seen::Dropped(_) | Seen::State(_) => {
            tell(seen);
            Ok(())
        }
    }
}

/// `palyra job logs`, and the same of a run.
pub(crate) async fn show(
    global: &Global,
    ask: impl AsyncFn(LogsRequest) -> Result<LogsResponse>,
    noun: &str,
    id: &str,
    goes_on: bool,
) -> Result {
    let out = global.out();
    let mut lines = 0;
    let mut shown = |seen: Seen<'_>| {
        lines += u64::from(matches!(seen, Seen::Line(_)));
        print(out, &seen)
    };
    if !goes_on {
        let answer = ask(Reader::default().ask(id, 0)).await?;
        let dispatch = answer.dispatch.unwrap_or_default();
        Reader::default().show(&dispatch, &answer.lines, answer.progress.as_ref(), &mut shown)?;
        return finish(out, &dispatch, lines);
    }
    let until = Instant::now() + global.timeout.unwrap_or(FOLLOW);
    match follow(ask, id, until, shown).await? {
        Ended::Over(dispatch) => finish(out, &dispatch, lines),
        Ended::Time => {
            note(&format!("it goes on; look again: palyra {noun} logs -f {id}"));
            Ok(())
        }
    }
}

/// When no replica has a line any more, what was kept with the result.
fn finish(out: Out, dispatch: &DispatchInfo, lines: u64) -> Result {
    told(dispatch);
    let kept = String::from_utf8_lossy(&dispatch.log_tail);
    if lines > 0 || !is_over(&dispatch.state) || kept.is_empty() {
        return Ok(());
    }
    note("no replica has its lines any more; kept with the result were the last:");
    for (at, text) in kept.lines().enumerate() {
        let line = LogLine {
            attempt: dispatch.attempt,
            line: at as u64 + 1,
            text: text.to_owned(),
        };
        print(out, &Seen::Line(&line))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(attempt: u32, line: u64) -> LogLine {
        LogLine {
            attempt,
            line,
            text: format!("{attempt}.{line}"),
        }
    }

    #[test]
    fn lines_are_shown_once_and_gaps_are_counted() {
        let mut shown = Vec::new();
        let mut show = |seen: Seen<'_>| {
            shown.push(match seen {
                Seen::Line(line) => line.text.clone(),
                Seen::Dropped(count) => format!("-{count}"),
                Seen::Progress(progress) => progress_words(progress),
                Seen::State(dispatch) => dispatch.state.clone(),
            });
            Ok(())
        };
        let mut reader = Reader::default();
        let mut dispatch = DispatchInfo {
            state: "dispatched".to_owned(),
            ..DispatchInfo::default()
        };
        let half = ProgressInfo {
            attempt: 1,
            percent: Some(50),
            message: "half".to_owned(),
            age_ms: 1,
        };
        let lines = [line(1, 1), line(1, 4)];
        assert!(reader.show(&dispatch, &lines, Some(&half), &mut show).unwrap());
        let older = ProgressInfo { age_ms: 900, ..half };
        assert!(!reader.show(&dispatch, &[], Some(&older), &mut show).unwrap());
        dispatch.state = "succeeded".to_owned();
        reader.show(&dispatch, &[line(2, 1)], None, &mut show).unwrap();
        assert_eq!((reader.ask("x", 0).attempt, reader.ask("x", 0).line), (2, 1));
        assert_eq!(shown, ["1.1", "-2", "1.4", "50% half", "succeeded", "2.1"]);
    }

    #[test]
    fn who_has_to_act_is_told_with_the_command() {
        let waits = palyra_proto::dispatch::v1::MediationInfo {
            since_ms: 1,
            host: "cam.local".to_owned(),
            device: "cam".to_owned(),
            prompt: "run unlock?".to_owned(),
            command: "palyra node mediation allow X".to_owned(),
        };
        let dispatch = DispatchInfo {
            mediation: Some(waits),
            ..DispatchInfo::default()
        };
        let words = waiting_words(&dispatch).unwrap();
        for part in [
            "cam.local",
            "(node cam)",
            "run unlock?",
            "palyra node mediation allow X",
        ] {
            assert!(words.contains(part), "{words}");
        }
        assert_eq!(waiting_words(&DispatchInfo::default()), None);
    }
}
