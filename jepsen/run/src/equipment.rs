//! What a run is equipped with, by what its faults need: the fabric of its network, and clocks that can be moved.
//!
//! What is not needed is left out: a run without faults of clocks has processes without a preloaded library.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail};

use crate::abilities::{Abilities, Ability};
use crate::cli::Usage;
use crate::clock::{self, Clocks};
use crate::inside::Ground;
use crate::nemesis::Asked;
use crate::net::Fabric;
use crate::net::bridge::Bridge;
use crate::net::tap::Tap;
use crate::run::Settings;

/// What this machine and these settings allow, by trying it.
#[must_use]
pub fn abilities(ground: Ground, settings: &Settings) -> Abilities {
    let mut abilities = Abilities::of(ground);
    let mut note = |ability, tried: Result<(), String>| match tried {
        Ok(()) => abilities.yes(ability),
        Err(why) => abilities.no(ability, why),
    };
    note(Ability::Tap, taps(ground, settings));
    note(
        Ability::Skew,
        clock::library().map(|_| ()).map_err(|error| format!("{error:#}")),
    );
    note(
        Ability::TimeNamespace,
        clock::time_namespaces().map_err(|error| format!("{error:#}")),
    );
    abilities
}

/// Notes what a run of these settings, whose workload has so many machines, is large enough for.
pub fn scene(abilities: &mut Abilities, settings: &Settings, hosts: u64) {
    if hosts > 0 {
        abilities.yes(Ability::Hosts);
    } else {
        let why = format!("the workload {} has no machines", settings.workload);
        abilities.no(Ability::Hosts, why);
    }
    if settings.replicas >= 5 {
        abilities.yes(Ability::Ring);
    } else {
        abilities.no(
            Ability::Ring,
            "a ring of majorities has five replicas: --replicas 5",
        );
    }
}

fn taps(ground: Ground, settings: &Settings) -> Result<(), String> {
    if !ground.is_apart() {
        return Err("there are no namespaces here; see jepsen doctor".to_owned());
    }
    if settings.fabric == "bridge" {
        return Err("--fabric bridge was asked for, and it forwards frames as they are".to_owned());
    }
    palyra_jepsen_switch::Tap::here("jepsen-try")
        .map(|_| ())
        .map_err(|error| error.to_string())
}

fn needed(asked: &[Asked], ability: Ability) -> bool {
    asked.iter().any(|asked| asked.kind.needs.contains(&ability))
}

/// The fabric that was asked for; of itself the kernel's, or the harness's own when a fault needs that.
///
/// # Errors
/// [`Usage`] when there is no such fabric; when it can't be made.
pub async fn fabric(settings: &Settings, asked: &[Asked]) -> Result<Arc<dyn Fabric>> {
    let own = match settings.fabric.as_str() {
        "tap" => true,
        "bridge" => false,
        "auto" => needed(asked, Ability::Tap),
        other => bail!(Usage(format!("--fabric {other}: it is auto, bridge or tap"))),
    };
    Ok(if own {
        Arc::new(Tap::build(settings.seed).await?)
    } else {
        Arc::new(Bridge::build().await?)
    })
}

/// The clocks of the run's replicas; `folder` holds the pages of those that can be moved.
///
/// # Errors
/// When `--boot-offsets` was asked for and can't be had.
pub fn clocks(settings: &Settings, asked: &[Asked], folder: &Path) -> Result<Clocks> {
    let library = if needed(asked, Ability::Skew) {
        clock::library().ok()
    } else {
        None
    };
    let seed = settings.boot_offsets.then_some(settings.seed);
    if seed.is_some() {
        clock::time_namespaces()
            .map_err(|error| error.context("--boot-offsets can't be had on this machine"))?;
    }
    Ok(Clocks::new(folder, library, seed))
}
