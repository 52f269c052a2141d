//! `pairing`: operators mint codes, and machines race for them at different replicas.
//!
//! Each proof is one try at one replica over the enrol listener, with a key of its own: the product's agent tries
//! again and elsewhere, a history needs each try. Conditions: `palyra_jepsen_check::pairing`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use async_trait::async_trait;
use palyra_client::new_ulid;
use palyra_proto::common::v1::WriteInfo;
use palyra_proto::pairing::v1 as wire;
use palyra_proto::pairing::v1::pairing_service_client::PairingServiceClient;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::enrol::{self, Proved, Secret};
use super::operator::{Asked, Operator};
use super::{Kind, Workload};
use crate::run::Run;

pub(super) const KIND: Kind = Kind {
    name: "pairing",
    does: "codes of operators, and machines that race for them at different replicas; ends, cancels, repeated answers",
    usual: &[
        "kill",
        "pause",
        "partition:leader",
        "partition:halves",
        "transfer",
        "clock:jump",
        "clock:skew",
        "reset",
        "loss",
    ],
    make: || Box::new(Pairing::default()),
};

/// The shortest life of a code: short enough to end within a run.
const SHORT: Duration = Duration::from_secs(30);
/// Of all others.
const LONG: Duration = Duration::from_secs(60);
/// Twenty attempts without a right proof within ten minutes close pairing for everybody; so many may be spent.
const SPENT_MAX: u64 = 14;
/// How long an operator insists on an answer.
const INSIST: Duration = Duration::from_secs(12);
/// Codes that wait for their end at one time.
const WAITING: usize = 3;

#[derive(Default)]
struct Pairing {
    /// Attempts that may count as failures.
    spent: Arc<AtomicU64>,
    /// Codes that are left to end, and when that is.
    waiting: Mutex<Vec<(Secret, Instant)>>,
}

#[async_trait]
impl Workload for Pairing {
    fn name(&self) -> &'static str {
        "pairing"
    }

    fn floors(&self) -> &'static [&'static str] {
        &["mint", "redeem", "approve", "fetch"]
    }

    async fn prepare(&self, _: &Arc<Run>) -> Result<()> {
        Ok(())
    }

    async fn client(&self, run: &Arc<Run>, number: u64) -> Result<()> {
        let mut operator = Operator::new(run, &format!("pairing {number}"))?;
        while run.is_loading() {
            match operator.chance.below(100) {
                0..40 => self.race(&mut operator).await?,
                40..70 => self.alone(&mut operator).await?,
                70..80 => self.taken_back(&mut operator).await?,
                80..88 => self.wrong(&mut operator).await?,
                _ => self.left(&mut operator).await?,
            }
            self.after_the_end(&mut operator).await?;
            operator.roam(false);
            operator.pace().await;
        }
        Ok(())
    }

    async fn finish(&self, run: &Arc<Run>) -> Result<()> {
        let mut operator = Operator::new(run, "pairing, last reads")?;
        // Everything is whole: one machine after the other, alone.
        for _ in 0..3 {
            self.alone(&mut operator).await?;
        }
        operator.rows().await
    }
}

impl Pairing {
    /// A new code. One whose answer was lost is nobody's: its secret is shown once.
    async fn mint(&self, operator: &mut Operator, pin: bool, ttl: Duration) -> Result<Option<Secret>> {
        let request = new_ulid();
        let ttl_ms = u64::try_from(ttl.as_millis())?;
        let method = if pin { "pin" } else { "ticket" };
        let asked = Asked::change("mint", json!({"method": method, "ttl_ms": ttl_ms}), &request);
        let told = |code: Option<&wire::CodeInfo>, write: Option<&WriteInfo>| {
            let id = code.map(|code| code.id.clone()).unwrap_or_default();
            (json!({"code": id}), write.map_or(0, |write| write.index))
        };
        if pin {
            let send = wire::MintPinRequest {
                request_id: request.clone(),
                ttl_ms,
                ..Default::default()
            };
            let minted = operator.ask(
                asked,
                |channel| async move { PairingServiceClient::new(channel).mint_pin(send).await },
                |done: &wire::MintPinResponse| told(done.code.as_ref(), done.write.as_ref()),
            );
            let Ok(done) = minted.await else { return Ok(None) };
            return Secret::pin(&done.pin, &done.code.unwrap_or_default()).map(Some);
        }
        let send = wire::MintTicketRequest {
            request_id: request.clone(),
            ttl_ms,
            ..Default::default()
        };
        let minted = operator.ask(
            asked,
            |channel| async move { PairingServiceClient::new(channel).mint_ticket(send).await },
            |done: &wire::MintTicketResponse| told(done.code.as_ref(), done.write.as_ref()),
        );
        let Ok(done) = minted.await else { return Ok(None) };
        Secret::ticket(&done.ticket).map(Some)
    }

    /// Two to six machines, each at a replica of its own choice.
    async fn race(&self, operator: &mut Operator) -> Result<()> {
        // The losers of a race for a PIN count as failures.
        let pin = operator.chance.percent(10) && self.may_spend(1);
        let Some(secret) = self.mint(operator, pin, LONG).await? else {
            return Ok(());
        };
        let rivals = if pin { 2 } else { operator.chance.between(2, 6) };
        let mut tries = JoinSet::new();
        for _ in 0..rivals {
            let at = operator.run.pick(&mut operator.chance, None);
            tries.spawn(enrol::redeem(
                Arc::clone(&operator.run),
                at,
                secret.clone(),
                json!({}),
            ));
        }
        let mut winner = None;
        while let Some(tried) = tries.join_next().await {
            winner = winner.or(tried.context("a machine panicked")??);
        }
        match winner {
            Some(winner) => self.decide(operator, winner).await,
            None => self.close(operator, &secret).await,
        }
    }

    /// One machine, and nobody else.
    async fn alone(&self, operator: &mut Operator) -> Result<()> {
        let pin = operator.chance.percent(30) && self.may_spend(1);
        let Some(secret) = self.mint(operator, pin, LONG).await? else {
            return Ok(());
        };
        let at = operator.run.pick(&mut operator.chance, Some(operator.at));
        let won = enrol::redeem(
            Arc::clone(&operator.run),
            at,
            secret.clone(),
            json!({"alone": true}),
        )
        .await?;
        if let Some(won) = won {
            if pin {
                self.spent.fetch_sub(1, Ordering::Relaxed);
            }
            return self.decide(operator, won).await;
        }
        self.close(operator, &secret).await
    }

    /// A code that is taken back before anybody comes.
    async fn taken_back(&self, operator: &mut Operator) -> Result<()> {
        let Some(secret) = self.mint(operator, false, LONG).await? else {
            return Ok(());
        };
        self.close(operator, &secret).await?;
        let at = operator.run.pick(&mut operator.chance, None);
        if let Some(won) = enrol::redeem(Arc::clone(&operator.run), at, secret, json!({})).await? {
            self.decide(operator, won).await?;
        }
        Ok(())
    }

    /// A wrong secret, then nothing.
    async fn wrong(&self, operator: &mut Operator) -> Result<()> {
        if !self.may_spend(1) {
            return Ok(());
        }
        let pin = operator.chance.percent(50);
        let Some(secret) = self.mint(operator, pin, LONG).await? else {
            return Ok(());
        };
        let at = operator.run.pick(&mut operator.chance, None);
        let wrong = secret.wrong();
        enrol::redeem(Arc::clone(&operator.run), at, wrong, json!({"wrong": true})).await?;
        self.close(operator, &secret).await
    }

    /// A code that nobody comes for until its end.
    async fn left(&self, operator: &mut Operator) -> Result<()> {
        if self.waiting.lock().await.len() >= WAITING {
            return Ok(());
        }
        if let Some(secret) = self.mint(operator, false, SHORT).await? {
            // Around its end, or well after it.
            let late = Duration::from_millis(operator.chance.between(0, 4_000));
            let due = Instant::now() + SHORT - Duration::from_millis(1_000) + late;
            self.waiting.lock().await.push((secret, due));
        }
        Ok(())
    }

    /// Somebody comes for a code that was left to end.
    async fn after_the_end(&self, operator: &mut Operator) -> Result<()> {
        let mut waiting = self.waiting.lock().await;
        let Some(place) = waiting.iter().position(|(_, due)| *due <= Instant::now()) else {
            return Ok(());
        };
        let (secret, _) = waiting.remove(place);
        drop(waiting);
        let at = operator.run.pick(&mut operator.chance, None);
        if let Some(won) = enrol::redeem(Arc::clone(&operator.run), at, secret, json!({})).await? {
            self.decide(operator, won).await?;
        }
        Ok(())
    }

    fn may_spend(&self, count: u64) -> bool {
        let more = |spent: u64| (spent + count <= SPENT_MAX).then_some(spent + count);
        self.spent
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .is_ok()
    }

    async fn close(&self, operator: &mut Operator, secret: &Secret) -> Result<()> {
        let request = new_ulid();
        let send = wire::RevokeCodeRequest {
            request_id: request.clone(),
            code: secret.code().to_owned(),
            ..Default::default()
        };
        let asked = Asked::change("close", json!({"code": secret.code()}), &request);
        let closed = operator.insist(
            asked,
            INSIST,
            |channel| {
                let send = send.clone();
                async move { PairingServiceClient::new(channel).revoke_code(send).await }
            },
            |_| (json!({}), 0),
        );
        // Used, or gone: it is as closed as can be.
        drop(closed.await);
        Ok(())
    }

    /// The operator approves, or rejects; the machine asks what became of it, at several replicas.
    async fn decide(&self, operator: &mut Operator, won: Proved) -> Result<()> {
        if operator.chance.percent(8) {
            self.reject(operator, &won).await;
        } else {
            self.approve(operator, &won).await;
        }
        for _ in 0..operator.chance.between(1, 2) {
            let at = operator.run.pick(&mut operator.chance, None);
            enrol::fetch(&operator.run, at, &won).await?;
        }
        Ok(())
    }

    async fn approve(&self, operator: &mut Operator, won: &Proved) {
        let request = new_ulid();
        let send = wire::ApproveRequest {
            request_id: request.clone(),
            id: won.pairing.clone(),
            ..Default::default()
        };
        for _ in 0..operator.chance.between(1, 2) {
            let asked = Asked::change("approve", json!({"pairing": won.pairing}), &request);
            let approved = operator.insist(
                asked,
                INSIST,
                |channel| {
                    let send = send.clone();
                    async move { PairingServiceClient::new(channel).approve(send).await }
                },
                |done: &wire::ApproveResponse| {
                    let index = done.write.as_ref().map_or(0, |write| write.index);
                    (certificate(done.request.as_ref()), index)
                },
            );
            drop(approved.await);
            operator.roam(true);
        }
    }

    async fn reject(&self, operator: &mut Operator, won: &Proved) {
        let request = new_ulid();
        let send = wire::RejectRequest {
            request_id: request.clone(),
            id: won.pairing.clone(),
            reason: "jepsen".to_owned(),
        };
        let asked = Asked::change("reject", json!({"pairing": won.pairing}), &request);
        let rejected = operator.insist(
            asked,
            INSIST,
            |channel| {
                let send = send.clone();
                async move { PairingServiceClient::new(channel).reject(send).await }
            },
            |_| (json!({}), 0),
        );
        drop(rejected.await);
    }
}

fn certificate(request: Option<&wire::RequestInfo>) -> Value {
    match request.map(|request| &request.certificate_fingerprint) {
        Some(fingerprint) if !fingerprint.is_empty() => json!({"certificate": fingerprint}),
        _ => json!({}),
    }
}
