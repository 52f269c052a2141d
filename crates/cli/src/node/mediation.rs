//! `palyra node mediation`: what dispatches ask the person at this machine.

use clap::Subcommand;
use palyra_node::mediation::{Pending, decide, list};
use serde::Serialize;

use super::host::Folder;
use crate::failure::Result;
use crate::output::table::{Column, column, wide};
use crate::output::time::Moment;
use crate::output::{Out, Record, Source};

/// What can be done about questions.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Lists what waits for a decision
    #[command(after_help = "Example:\n  palyra node mediation ls")]
    Ls(Folder),
    /// Lets a dispatch run
    #[command(after_help = "Example:\n  palyra node mediation allow 01J9ZM")]
    Allow {
        /// The dispatch, or the beginning of its id
        id: String,
        #[command(flatten)]
        folder: Folder,
    },
    /// Refuses a dispatch
    #[command(after_help = "Example:\n  palyra node mediation deny 01J9ZM")]
    Deny {
        /// The dispatch, or the beginning of its id
        id: String,
        #[command(flatten)]
        folder: Folder,
    },
}

/// A question as it is printed.
#[derive(Debug, Clone, Serialize)]
struct QuestionView {
    id: String,
    capability: String,
    description: String,
    input: String,
    since: Moment,
    deadline_at: Moment,
}

impl From<Pending> for QuestionView {
    fn from(pending: Pending) -> QuestionView {
        QuestionView {
            id: pending.id,
            capability: pending.capability,
            description: pending.description,
            input: pending.payload,
            since: Moment(pending.since_ms),
            deadline_at: Moment(pending.deadline_at_ms),
        }
    }
}

impl Record for QuestionView {
    const COLUMNS: &'static [Column] = &[
        column("DISPATCH"),
        column("CAPABILITY"),
        column("INPUT"),
        column("ASKED"),
        column("LAPSES"),
        wide("DESCRIPTION"),
    ];

    fn key(&self) -> String {
        self.id.clone()
    }

    fn cells(&self, now_ms: u64) -> Vec<String> {
        vec![
            self.id.clone(),
            self.capability.clone(),
            self.input.clone(),
            self.since.told(now_ms),
            self.deadline_at.told(now_ms),
            self.description.clone(),
        ]
    }
}

/// Does what was asked about questions.
pub(crate) async fn run(out: Out, verb: Verb) -> Result {
    let (id, folder, allow) = match verb {
        Verb::Ls(folder) => {
            let pending = list(&folder.dir()).await?;
            let items: Vec<QuestionView> = pending.into_iter().map(QuestionView::from).collect();
            return out.list(&items, Source::default());
        }
        Verb::Allow { id, folder } => (id, folder, true),
        Verb::Deny { id, folder } => (id, folder, false),
    };
    let view = QuestionView::from(decide(&folder.dir(), &id, allow).await?);
    let word = if allow { "allowed" } else { "denied" };
    out.plain(&view, &format!("{word}: {} ({})\n", view.capability, view.id))
}
