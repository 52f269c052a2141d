//! A nemesis that does nothing and can not show that it did: a run with it alone must not pass.

use std::sync::Arc;

use anyhow::Result;
use async_trait::async_trait;

use super::{Evidence, Fault, Kind, Nemesis};
use crate::plan::Step;
use crate::run::Run;

pub(super) const KINDS: &[Kind] = &[Kind {
    name: "noop",
    argument: None,
    does: "does nothing; a run with it must end in exit code 2, or the harness is blind",
    needs: &[],
    all: None,
    make: |_| Ok(Box::new(Noop)),
}];

struct Noop;

#[async_trait]
impl Nemesis for Noop {
    fn name(&self) -> &str {
        "noop"
    }

    async fn start(&self, _: &Arc<Run>, _: &Step, _: &[u64]) -> Result<Box<dyn Fault>> {
        Ok(Box::new(Noop))
    }
}

#[async_trait]
impl Fault for Noop {
    async fn stop(self: Box<Self>, _: &Arc<Run>) -> Result<Evidence> {
        Ok(Evidence::when(false, "nothing was done"))
    }
}
