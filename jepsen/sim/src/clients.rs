//! Clients of the registry: registers kept in nodes' labels, written and read with linearizable consistency at replicas
//! of the clients' choice. A register's version is the generation of its node's registration.

use std::rc::Rc;
use std::time::Duration;

use palyra_jepsen_check::Kind;
use palyra_jepsen_check::history::Answer as Told;
use palyra_platform as platform;
use palyra_state::{Id, Reply};
use serde_json::json;

use crate::chance;
use crate::cluster::{Cluster, Phase};
use crate::fleet;
use crate::history::{Asked, Outcome};
use crate::tape;

/// Between two writes of a steady client.
const RATE: Duration = Duration::from_millis(60);

/// One client of the registers: one operation after the other, until faults end.
pub(crate) async fn registers(cluster: Rc<Cluster>, number: u64, keys: Vec<Id>) {
    let mut value = number * 1_000_000;
    let mut at = cluster.any_member();
    while cluster.phase.get() == Phase::Faults {
        let key = keys[usize::try_from(chance::below(keys.len() as u64)).unwrap_or(0)];
        let outcome = if chance::percent(55) {
            value += 1;
            write(&cluster, at, key, value).await
        } else {
            read(&cluster, at, key).await
        };
        if outcome.index().is_none() || chance::percent(10) {
            at = cluster.any_member();
        }
        platform::sleep(Duration::from_millis(chance::between(1, 60))).await;
    }
}

/// A client that sends at a fixed rate, whatever becomes of it: one that waits for answers would ask nothing just when
/// nobody is served.
pub(crate) async fn steady(cluster: Rc<Cluster>, number: u64, keys: Vec<Id>) {
    let mut value = number * 1_000_000;
    let mut sent = Vec::new();
    while cluster.phase.get() == Phase::Faults {
        value += 1;
        let key = keys[usize::try_from(value).unwrap_or(0) % keys.len()];
        let (at, asking) = (cluster.any_member(), cluster.clone());
        sent.push(tokio::task::spawn_local(async move {
            write(&asking, at, key, value).await;
        }));
        platform::sleep(RATE).await;
    }
    for write in sent {
        if let Err(died) = write.await {
            cluster.problem(format!("a client did not end: {died}"));
        }
    }
}

/// Sets a register.
pub(crate) async fn write(cluster: &Cluster, at: u64, key: Id, value: u64) -> Outcome {
    let envelope = fleet::write(fleet::node(key, 0), key, value);
    let wanted = json!({"key": key.to_string(), "value": value});
    let call = cluster.invoke("write", wanted.clone(), Some(at), Some(envelope.request_id));
    let answer = cluster
        .ask_noted(at, envelope, |answer| Asked::Write {
            key,
            value,
            request: answer.request,
        })
        .await;
    let mut told = wanted;
    told["duplicate"] = answer.again.into();
    if let Some(Ok(Reply::Registered(registered))) = &answer.reply {
        told["version"] = registered.generation.into();
    }
    // Values are written once: one that changes nothing was written before, under another request.
    let kind = match answer.outcome {
        Outcome::Quiet(_) => Kind::Info,
        ref outcome => tape::kind(outcome),
    };
    let told = Told {
        value: told,
        rev: answer.outcome.index(),
        ..Told::default()
    };
    cluster.complete(&call, kind, told);
    answer.outcome
}

/// Reads a register.
pub(crate) async fn read(cluster: &Cluster, at: u64, key: Id) -> Outcome {
    let invoked = cluster.history.borrow_mut().tick();
    let wanted = json!({"key": key.to_string()});
    let call = cluster.invoke("read", wanted, Some(at), None);
    let found = cluster.read(at, move |view| fleet::register(view, key)).await;
    let read = found.map(|(index, (value, _))| (index, value));
    let kind = if read.is_some() { Kind::Ok } else { Kind::Info };
    let value = read.map(|(_, value)| value).filter(|value| *value > 0);
    let version = found.map(|(_, (_, version))| version);
    let told = Told {
        value: json!({"key": key.to_string(), "value": value, "version": version}),
        rev: read.map(|(index, _)| index),
        ..Told::default()
    };
    cluster.complete(&call, kind, told);
    let asked = Asked::Read {
        key,
        value: read.map_or(0, |(_, value)| value),
    };
    let outcome = read.map_or(Outcome::Unknown, |(index, _)| Outcome::Ok(index));
    cluster.record(at, asked, outcome.clone(), invoked);
    outcome
}
