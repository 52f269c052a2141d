//! Rules of nftables at the receiver: they cut, lose and answer by resets, on any fabric.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde_json::Value;
use tokio::sync::Mutex;

use super::{Rule, Rules, Seat, Way, tool};

const TABLE: &str = "jepsen";

/// The tables of all receivers.
#[derive(Default)]
pub(crate) struct Filter {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Receivers that have a table.
    ruled: BTreeSet<Seat>,
    /// Of tables that are gone.
    counted: BTreeMap<Way, u64>,
}

impl Filter {
    /// Makes exactly these rules true.
    ///
    /// # Errors
    /// When nft refuses, with what it said.
    pub(crate) async fn apply(&self, rules: &Rules) -> Result<()> {
        let mut state = self.state.lock().await;
        state.counted = count(&state).await?;
        let receivers: BTreeSet<Seat> = rules.keys().map(|(_, to)| *to).collect();
        for receiver in receivers.union(&state.ruled.clone()) {
            nft(*receiver, &["-f", "-"], &script(*receiver, rules)).await?;
        }
        state.ruled = receivers;
        Ok(())
    }

    /// Packets that were struck so far.
    ///
    /// # Errors
    /// When nft refuses, with what it said.
    pub(crate) async fn count(&self) -> Result<BTreeMap<Way, u64>> {
        let state = self.state.lock().await;
        count(&state).await
    }
}

async fn count(state: &State) -> Result<BTreeMap<Way, u64>> {
    let mut counts = state.counted.clone();
    for receiver in &state.ruled {
        let told = nft(*receiver, &["-j", "list", "table", "inet", TABLE], "").await?;
        for (sender, packets) in counters(&told)? {
            if let Some(sender) = Seat::at(&sender) {
                *counts.entry((sender, *receiver)).or_default() += packets;
            }
        }
    }
    Ok(counts)
}

async fn nft(seat: Seat, arguments: &[&str], input: &str) -> Result<String> {
    let prefix = seat.prefix();
    let mut program: Vec<&str> = prefix.iter().map(String::as_str).collect();
    program.push("nft");
    program.extend(arguments);
    tool(&program, input).await
}

/// Replaces the receiver's table in one step: there is no moment without rules, or with half of them.
fn script(receiver: Seat, rules: &Rules) -> String {
    let mut lines = format!("table inet {TABLE}\ndelete table inet {TABLE}\n");
    let here = rules
        .iter()
        .filter(|((_, to), rule)| *to == receiver && **rule != Rule::NONE);
    let here: Vec<_> = here.collect();
    if here.is_empty() {
        return lines;
    }
    let _ = writeln!(lines, "table inet {TABLE} {{\nchain input {{");
    let _ = writeln!(lines, "type filter hook input priority 0; policy accept;");
    for ((from, _), rule) in here {
        let at = from.address();
        if rule.cut {
            let _ = writeln!(lines, "ip saddr {at} counter drop");
        }
        if rule.loss > 0 {
            let _ = writeln!(
                lines,
                "ip saddr {at} numgen random mod 100 < {} counter drop",
                rule.loss
            );
        }
        if rule.reset {
            let _ = writeln!(
                lines,
                "ip saddr {at} meta l4proto tcp counter reject with tcp reset"
            );
        }
    }
    lines.push_str("}\n}\n");
    lines
}

/// What nft's JSON says of counters: packets by the sender's address.
fn counters(json: &str) -> Result<Vec<(String, u64)>> {
    let told: Value = serde_json::from_str(json).context("nft -j printed no JSON")?;
    let things = told["nftables"].as_array().cloned().unwrap_or_default();
    let mut counted = Vec::new();
    for rule in things.iter().filter_map(|thing| thing.get("rule")) {
        let parts = rule["expr"].as_array().cloned().unwrap_or_default();
        let sender = parts
            .iter()
            .find_map(|part| part["match"]["right"].as_str().map(str::to_owned));
        let packets = parts.iter().find_map(|part| part["counter"]["packets"].as_u64());
        if let (Some(sender), Some(packets)) = (sender, packets) {
            counted.push((sender, packets));
        }
    }
    Ok(counted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::between;

    #[test]
    fn a_receiver_has_rules_about_its_senders_only() {
        let [one, two, three] = [1, 2, 3].map(Seat::Replica);
        let mut rules = between(&[one], &[two], Rule::CUT);
        let lossy = Rule {
            loss: 7,
            reset: true,
            ..Rule::NONE
        };
        rules.insert((three, one), lossy);
        let text = script(one, &rules);
        assert!(text.contains("ip saddr 10.77.1.2 counter drop"));
        assert!(text.contains("ip saddr 10.77.1.3 numgen random mod 100 < 7 counter drop"));
        assert!(text.contains("10.77.1.3 meta l4proto tcp counter reject with tcp reset"));
        assert!(!text.contains("10.77.1.1 "), "nothing about itself");
        assert!(
            !script(three, &rules).contains("chain"),
            "a receiver without rules has no chain"
        );
    }

    #[test]
    fn counters_are_read_by_sender() {
        let json = r#"{"nftables":[{"metainfo":{}},{"rule":{"expr":[
            {"match":{"op":"==","left":{"payload":{"protocol":"ip","field":"saddr"}},"right":"10.77.1.2"}},
            {"counter":{"packets":41,"bytes":9}},{"drop":null}]}}]}"#;
        assert_eq!(counters(json).unwrap(), [("10.77.1.2".to_owned(), 41)]);
        assert!(counters("no").is_err());
    }
}
