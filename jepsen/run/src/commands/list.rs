//! `jepsen list`: what there is.

use anyhow::Result;
use serde_json::json;

use crate::cli::{Form, ListArgs, Listed};
use crate::{mutants, nemesis, scenario, workloads};

/// Prints it.
///
/// # Errors
/// When it can't be printed.
pub fn main(args: &ListArgs) -> Result<u8> {
    if args.what == Listed::Mutants {
        println!("{}", mutants::list(args.output).trim_end());
        return Ok(0);
    }
    let rows: Vec<(String, String)> = match args.what {
        Listed::Workloads => workloads::kinds()
            .iter()
            .map(|kind| {
                let does = format!("{}; usual nemeses: {}", kind.does, kind.usual.join(","));
                (kind.name.to_owned(), does)
            })
            .collect(),
        Listed::Scenarios => scenario::all()?
            .into_iter()
            .map(|scenario| (scenario.name, scenario.title))
            .collect(),
        Listed::Mutants => Vec::new(),
        Listed::Nemeses => {
            let name = |kind: &nemesis::Kind| match kind.argument {
                Some(form) => format!("{}:{form}", kind.name),
                None => kind.name.to_owned(),
            };
            nemesis::kinds()
                .iter()
                .map(|kind| (name(kind), kind.does.to_owned()))
                .collect()
        }
    };
    match args.output {
        Form::Json => {
            let rows: Vec<_> = rows
                .iter()
                .map(|(name, does)| json!({"name": name, "does": does}))
                .collect();
            println!("{}", serde_json::to_string(&rows)?);
        }
        Form::Text => {
            let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
            for (name, does) in rows {
                println!("{name:<width$}  {does}");
            }
        }
    }
    Ok(0)
}
