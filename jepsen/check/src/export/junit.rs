//! A JUnit report: each check a case, so that a build server shows which condition broke.
//!
//! Valid is passed, violated is a failure, unknown is an error: a build server must not take it for a success.

use std::fmt::Write;

use super::Title;
use crate::history::History;
use crate::verdict::{Outcome, Verdict};

/// How many violations of a check are told in its case.
const TOLD: usize = 20;

/// The report.
#[must_use]
pub fn report(title: &Title, history: &History, verdict: &Verdict) -> String {
    let seconds = history.events.last().map_or(0.0, |event| event.time as f64 / 1e9);
    let violated = |outcome: &Outcome| matches!(outcome, Outcome::Invalid { .. });
    let unknown = |outcome: &Outcome| matches!(outcome, Outcome::Unknown { .. });
    let count =
        |is: &dyn Fn(&Outcome) -> bool| verdict.checks.iter().filter(|check| is(&check.outcome)).count();
    let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let suite = format!(
        "jepsen {} nemesis={} seed={}",
        title.workload, title.nemesis, title.seed
    );
    let numbers = format!(
        "tests=\"{}\" failures=\"{}\" errors=\"{}\" time=\"{seconds:.3}\"",
        verdict.checks.len(),
        count(&violated),
        count(&unknown)
    );
    let _ = writeln!(
        xml,
        "<testsuites {numbers}>\n  <testsuite name=\"{}\" {numbers}>",
        escape(&suite)
    );
    for check in &verdict.checks {
        let class = check.name.split('.').next().unwrap_or_default();
        let _ = write!(
            xml,
            "    <testcase classname=\"jepsen.{}\" name=\"{}\" time=\"0\"",
            escape(class),
            escape(&check.name)
        );
        match &check.outcome {
            Outcome::Valid => xml.push_str("/>\n"),
            Outcome::Invalid { violations } => {
                let first = violations.first().map_or("", |violation| violation.what.as_str());
                let _ = writeln!(xml, ">\n      <failure message=\"{}\">", escape(first));
                for violation in violations.iter().take(TOLD) {
                    let time = violation.time as f64 / 1e9;
                    let _ = writeln!(
                        xml,
                        "t={time:.6}s {} events={:?}",
                        escape(&violation.what),
                        violation.events
                    );
                }
                let _ = writeln!(
                    xml,
                    "replay: {}</failure>\n    </testcase>",
                    escape(&title.replay)
                );
            }
            Outcome::Unknown { why } => {
                let _ = writeln!(
                    xml,
                    ">\n      <error message=\"{}\"/>\n    </testcase>",
                    escape(why)
                );
            }
        }
    }
    xml.push_str("  </testsuite>\n</testsuites>\n");
    xml
}

/// Text as XML may have it: what XML cannot say at all becomes a question mark.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' => escaped.push_str("&#10;"),
            '\t' => escaped.push(' '),
            other if other.is_control() || matches!(other, '\u{fffe}' | '\u{ffff}') => escaped.push('?'),
            other => escaped.push(other),
        }
    }
    escaped
}
