//! The tree of commands. Each noun's own verbs stand with their code.

use clap::{Parser, Subcommand};
use clap_complete::Shell;

use crate::session::Global;

const OVERVIEW: &str = "\
First steps:
  palyra cluster init --data-dir /var/lib/palyra/r1 --name r1
  palyrad run --config /var/lib/palyra/r1/palyrad.toml
  palyra pairing code
  palyra node ls

Exit codes:
  0 ok            1 internal       2 usage             3 auth
  4 unreachable   5 unsupported    6 policy            7 precondition
  8 not found     9 no quorum     10 stale            11 conflict
 12 partial      13 unknown       14 a check found problems";

/// A replicated control plane for a fleet of machines: pair them, see them, run things on them.
#[derive(Debug, Parser)]
#[command(name = "palyra", version, about, after_help = OVERVIEW, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// The cluster itself: birth, health, replicas
    #[command(subcommand)]
    Cluster(crate::cluster::Verb),
    /// The cluster's roots and authorities, and their rotation
    #[command(subcommand)]
    Ca(crate::ca::Verb),
    /// Let machines in: codes, tickets, approvals
    #[command(subcommand)]
    Pairing(crate::pairing::Verb),
    /// The fleet's nodes, and the agent on this machine
    #[command(subcommand, visible_alias = "nodes")]
    Node(crate::node::Verb),
    /// Identities of paired machines, and their revocation
    #[command(subcommand, visible_alias = "devices")]
    Device(crate::device::Verb),
    /// Dispatches: what was asked of nodes, and what came of it
    #[command(subcommand, visible_alias = "jobs")]
    Job(crate::job::Verb),
    /// Workers: nodes that run other people's work, what they proved, and what they are held to
    #[command(subcommand, visible_alias = "workers")]
    Worker(crate::worker::Verb),
    /// Runs: one execution of one tool on a worker, with files in and out
    #[command(subcommand, visible_alias = "runs")]
    Run(crate::run::Verb),
    /// Leases: which worker is bound to which run, and until when
    #[command(subcommand, visible_alias = "leases")]
    Lease(crate::lease::Verb),
    /// What waits for a person: grants that were asked for, machines that ask to be paired
    #[command(subcommand, visible_alias = "approvals")]
    Approval(crate::approval::Verb),
    /// Permission to run one tool once
    #[command(subcommand, visible_alias = "grants")]
    Grant(crate::grant::Verb),
    /// The hash-chained record of every accepted action
    #[command(subcommand)]
    Journal(crate::journal::Verb),
    /// Who may operate the cluster
    #[command(subcommand, visible_alias = "operators")]
    Operator(crate::operator::Verb),
    /// Clusters that this machine knows
    #[command(subcommand, visible_alias = "contexts")]
    Context(crate::context::Verb),
    /// Who the cluster takes you for
    #[command(after_help = "Example:\n  palyra whoami")]
    Whoami,
    /// Versions of this program and of the replicas
    #[command(after_help = "Example:\n  palyra version -o json")]
    Version,
    /// Completion for a shell
    #[command(
        after_help = "Example:\n  palyra completion bash > ~/.local/share/bash-completion/completions/palyra"
    )]
    Completion {
        /// Which shell
        shell: Shell,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn leaves(command: &clap::Command, path: &str, out: &mut Vec<(String, clap::Command)>) {
        let path = format!("{path} {}", command.get_name());
        if command.get_subcommands().next().is_none() {
            out.push((path.clone(), command.clone()));
        }
        for sub in command.get_subcommands() {
            leaves(sub, &path, out);
        }
    }

    #[test]
    fn the_tree_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_an_example_that_this_program_understands() {
        let mut all = Vec::new();
        leaves(&Cli::command(), "", &mut all);
        assert!(all.len() > 40, "{}", all.len());
        for (path, command) in all {
            let help = command
                .get_after_help()
                .unwrap_or_else(|| panic!("{path} has no example"))
                .to_string();
            assert!(help.starts_with("Example"), "{path}: {help}");
            let examples = help
                .lines()
                .map(str::trim)
                .filter(|line| line.starts_with("palyra "));
            let mut count = 0;
            for example in examples {
                let words = words(example);
                count += 1;
                if let Err(error) = Cli::try_parse_from(&words) {
                    panic!("{path}: {example}\n{error}");
                }
            }
            assert!(count > 0, "{path} has no example");
        }
    }

    /// What the documentation and the errors tell people to type. An example may leave arguments out or name
    /// them in capitals; a verb or a flag that is not there is a lie.
    #[test]
    fn the_documentation_types_what_this_program_understands() {
        use clap::error::ErrorKind;
        let root = std::path::Path::new(".").join("../..");
        let mut files = vec![root.join("README.md")];
        for folder in ["docs", "docs/errors", "docs/decisions", "docs/protocol"] {
            let entries = std::fs::read_dir(root.join(folder)).unwrap();
            files.extend(
                entries
                    .map(|entry| entry.unwrap().path())
                    .filter(|path| path.extension().is_some_and(|e| e == "md")),
            );
        }
        let mut count = 0;
        for file in files {
            let text = std::fs::read_to_string(&file).unwrap();
            let in_lines = text
                .lines()
                .map(str::trim)
                .filter(|line| line.starts_with("palyra "));
            let in_words = text
                .split('`')
                .skip(1)
                .step_by(2)
                .filter(|code| code.starts_with("palyra "));
            for command in in_lines.chain(in_words.filter(|code| !code.contains('\n'))) {
                let command = command.split(['#', '&', ';']).next().unwrap_or_default().trim();
                let words = words(command);
                count += 1;
                if let Err(error) = Cli::try_parse_from(&words) {
                    let known = !matches!(
                        error.kind(),
                        ErrorKind::InvalidSubcommand | ErrorKind::UnknownArgument
                    );
                    assert!(known, "{}: {command}\n{error}", file.display());
                }
            }
        }
        assert!(count > 50, "{count}");
    }

    /// Splits like a shell: quotes, and nothing behind a pipe or a redirection.
    fn words(line: &str) -> Vec<String> {
        let mut words = Vec::new();
        let mut word = String::new();
        let (mut quote, mut open) = (None, false);
        for c in line.chars() {
            match (quote, c) {
                (None, '|' | '>') => break,
                (None, '\'' | '"') => (quote, open) = (Some(c), true),
                (Some(q), c) if q == c => quote = None,
                (None, ' ') => {
                    if open {
                        words.push(std::mem::take(&mut word));
                    }
                    open = false;
                }
                (_, c) => {
                    word.push(c);
                    open = true;
                }
            }
        }
        if open {
            words.push(word);
        }
        words
    }
}
