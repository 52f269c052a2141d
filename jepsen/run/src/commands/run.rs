//! `jepsen run`: one workload under faults, and the verdict.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use palyra_jepsen_check::evidence::{Setting, Window};
use palyra_jepsen_check::{Facts, History};
use tokio_util::sync::CancellationToken;

use crate::abilities::{Abilities, Ability};
use crate::cli::{Form, Keep, RunArgs, Usage};
use crate::cluster::{Cluster, Parts, Programs};
use crate::conduct::{Course, Done, conduct};
use crate::disk::{self, Disks, Medium};
use crate::inside::{self, Ground};
use crate::judge::{self, Results};
use crate::nemesis::{self, Asked, Scene};
use crate::net::Net;
use crate::plan::{self, Step, Wish};
use crate::record::{Clock, Record};
use crate::run::{Ingredients, Phase, Run, Settings};
use crate::store::{self, Kept, KeptEnd};
use crate::workloads::{self, Workload};
use crate::{daemon, equipment};

/// Runs it, inside namespaces where there are any.
///
/// # Errors
/// [`Usage`] when it was asked for wrongly; otherwise the harness failed.
pub fn main(args: &RunArgs) -> Result<u8> {
    // Before anything is entered: what is wrong with the words is told at once.
    let workload: Arc<dyn Workload> = workloads::find(&args.workload).map_err(usage)?.into();
    let settings = settings(args, workload.as_ref())?;
    let (ground, reduced) = match inside::here() {
        Some(ground) => (ground, None),
        None => inside::best_ground(),
    };
    nemesis::parse(&settings.nemeses, |_| true).map_err(usage)?;
    Programs::find(settings.binary.as_deref()).map_err(usage)?;
    if inside::here().is_none() {
        if let Some(why) = reduced {
            eprintln!("jepsen: reduced: {why}");
        }
        return inside::enter(ground);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let results = runtime.block_on(whole(ground, settings, &workload, args))?;
    match args.output {
        Form::Json => println!("{}", serde_json::to_string(&results)?),
        Form::Text => {
            tell_checks(&results);
            println!("{}", results.line());
        }
    }
    // Tasks that still wait for something end with the process.
    runtime.shutdown_background();
    Ok(results.exit_code())
}

fn usage(error: anyhow::Error) -> anyhow::Error {
    Usage(format!("{error:#}")).into()
}

/// A number of clients as people write it: `6`, or `2n` for two for each replica.
fn clients(text: &str, replicas: u64) -> Result<u64> {
    let (digits, each) = match text.strip_suffix('n') {
        Some(digits) => (digits, replicas),
        None => (text, 1),
    };
    let clients = digits
        .parse::<u64>()
        .ok()
        .and_then(|count| count.checked_mul(each));
    match clients {
        Some(clients @ 1..=1_000) => Ok(clients),
        _ => Err(Usage(format!(
            "--concurrency {text}: from 1 to 1000 clients, or 2n for two for each replica"
        ))
        .into()),
    }
}

fn settings(args: &RunArgs, workload: &dyn Workload) -> Result<Settings> {
    let seed = match args.seed {
        Some(seed) => seed,
        None => u64::from(std::process::id()) ^ palyra_client::wall_ms() & 0xff_ffff,
    };
    let concurrency = match &args.concurrency {
        Some(text) => clients(text, args.replicas)?,
        None => workload.clients().max(2 * args.replicas),
    };
    if concurrency < workload.clients() {
        let (name, least) = (&args.workload, workload.clients());
        return Err(Usage(format!(
            "--concurrency {concurrency}: {name} needs {least} clients"
        ))
        .into());
    }
    let nemeses = args
        .nemesis
        .iter()
        .filter(|name| *name != "none" && !name.is_empty());
    Ok(Settings {
        workload: args.workload.clone(),
        nemeses: nemeses
            .map(|name| match name.as_str() {
                "usual" => nemesis::usual(&args.workload),
                name => name.to_owned(),
            })
            .collect(),
        time: args.time,
        seed,
        replicas: args.replicas,
        rate: args.rate,
        concurrency,
        interval: args.nemesis_interval,
        target: args.target.map(|target| target.to_string()),
        fabric: args.fabric.clone(),
        boot_offsets: args.boot_offsets,
        disk: args.disk.clone(),
        binary: args.binary.clone(),
        old_binary: args.old_binary.clone(),
        plan: args.plan.clone(),
        keep: match args.keep {
            Keep::Always => "always".to_owned(),
            Keep::Fail => "fail".to_owned(),
        },
    })
}

async fn whole(
    ground: Ground,
    settings: Settings,
    workload: &Arc<dyn Workload>,
    args: &RunArgs,
) -> Result<Results> {
    let stop = inside::asked_to_stop();
    let name = args.name.as_deref().unwrap_or(&settings.workload);
    let folder = store::make(&args.store, name, settings.seed)?;
    let programs = Programs::find(settings.binary.as_deref())?;
    let mut abilities = equipment::abilities(ground, &settings);
    let medium = medium(ground, &settings, &folder, &mut abilities)?;
    equipment::scene(&mut abilities, &settings, workload.hosts());
    let short_log = daemon::attempt(&mut abilities, &programs, &settings).await?;
    let (asked, steps) = planned(&settings, &abilities, workload)?;
    plan::write(&folder.join("plan.jsonl"), &steps)?;
    let names: Vec<String> = asked
        .iter()
        .map(|asked| asked.nemesis.name().to_owned())
        .collect();
    let net = network(ground, &settings, &asked).await?;
    let record = Record::new(Clock::begin());
    let data = data_folder(medium, &folder).await?;
    let cluster = Cluster::new(Parts {
        data: data.clone(),
        logs: folder.join("logs"),
        programs,
        settings: daemon::configuration(workload.settings(), short_log)?,
        net: net.clone(),
        clocks: equipment::clocks(&settings, &asked, &data)?,
        disks: Disks::new(medium, settings.seed),
    })?;
    let run = Arc::new(Run::new(Ingredients {
        settings: settings.clone(),
        cluster: Arc::new(cluster),
        net,
        record: record.clone(),
        abilities,
        host_count: workload.hosts(),
        stop: stop.clone(),
    }));
    let telling = CancellationToken::new();
    let _told = telling.clone().drop_guard();
    if std::io::stderr().is_terminal() {
        tokio::spawn(progress(Arc::clone(&run), telling.clone()));
    }
    let began = palyra_began();
    let went = async {
        run.cluster
            .birth(settings.replicas)
            .await
            .context("the cluster's birth")?;
        conduct(&run, workload, asked, steps).await
    };
    let course = went
        .await
        .map_err(|error| error.context(format!("see {}", folder.join("logs").display())))?;
    let kept = keep(&run, workload.as_ref(), ground, names, course, began);
    let results = settle(&record.history(), &kept, &folder)?;
    end(&run, &results, &data, &folder).await?;
    Ok(results)
}

/// Keeps what happened, judges it, and writes down what is made of it.
fn settle(history: &History, kept: &Kept, folder: &Path) -> Result<Results> {
    store::write_json(&folder.join("run.json"), kept)?;
    history.save(&folder.join("history.jsonl"))?;
    sound(history)?;
    let results = judge::judge(kept, history, &folder.display().to_string());
    results.export(folder, history)?;
    Ok(results)
}

/// Chooses what data is on, and notes what that and the kernel's control groups make possible.
fn medium(ground: Ground, settings: &Settings, folder: &Path, abilities: &mut Abilities) -> Result<Medium> {
    nemesis::limits::note(abilities);
    let needed = needs(settings, Ability::Fuse)?;
    let scratch = folder.join("probe");
    disk::choose(abilities, &settings.disk, ground, needed, &scratch).map_err(usage)
}

/// The nemeses that were asked for, by their names in the plan when there is one.
fn asked_for(settings: &Settings) -> Result<Vec<String>> {
    let Some(path) = &settings.plan else {
        return Ok(settings.nemeses.clone());
    };
    let mut names: Vec<String> = plan::read(path)?.into_iter().map(|step| step.nemesis).collect();
    names.sort();
    names.dedup();
    Ok(names)
}

/// Whether a nemesis that was asked for needs this.
fn needs(settings: &Settings, ability: Ability) -> Result<bool> {
    let asked = nemesis::parse(&asked_for(settings)?, |_| true)?;
    Ok(asked.iter().any(|asked| asked.kind.needs.contains(&ability)))
}

fn planned(
    settings: &Settings,
    abilities: &Abilities,
    workload: &Arc<dyn Workload>,
) -> Result<(Vec<Asked>, Vec<Step>)> {
    let can = |kind: &nemesis::Kind| {
        // Among fewer every replica of a ring still hears all others.
        let fits = kind.name != "partition:ring" || settings.replicas >= 5;
        fits && abilities.have(kind.needs).is_ok()
    };
    let scene = Scene {
        replicas: (1..=settings.replicas).collect(),
        hosts: workload.hosts(),
    };
    if let Some(path) = &settings.plan {
        return Ok((nemesis::parse(&asked_for(settings)?, can)?, plan::read(path)?));
    }
    let asked = nemesis::parse(&settings.nemeses, can)?;
    let wish = Wish {
        seed: settings.seed,
        window: settings.window(),
        interval: settings.interval,
        target: settings.target(),
    };
    let steps = plan::draw(&wish, &asked, &scene);
    Ok((asked, steps))
}

async fn network(ground: Ground, settings: &Settings, asked: &[Asked]) -> Result<Net> {
    if !ground.is_apart() {
        return Ok(Net::new(None));
    }
    // A /run of our own: namespaces and data are named there, and the machine's stays as it is.
    crate::net::tool(&["mount", "-t", "tmpfs", "-o", "mode=755", "jepsen", "/run"], "").await?;
    Ok(Net::new(Some(equipment::fabric(settings, asked).await?)))
}

async fn data_folder(medium: Medium, folder: &Path) -> Result<PathBuf> {
    let data = match medium {
        Medium::Dir => folder.join("data"),
        Medium::Faultfs | Medium::Tmpfs => PathBuf::from("/run/jepsen/data"),
    };
    tokio::fs::create_dir_all(&data)
        .await
        .with_context(|| format!("cannot make {}", data.display()))?;
    Ok(data)
}

fn palyra_began() -> String {
    time::OffsetDateTime::now_utc().to_string()
}

fn keep(
    run: &Run,
    workload: &dyn Workload,
    ground: Ground,
    nemeses: Vec<String>,
    course: Course,
    began: String,
) -> Kept {
    let ended = run.cluster.ended().into_iter().map(|end| KeptEnd {
        time: end.time,
        replica: end.replica,
        how: end.how,
        allowed: end.allowed,
    });
    let claims = run
        .leaders
        .claims()
        .into_iter()
        .map(|(term, who)| (term, who.into_iter().collect()));
    let mut facts = Facts {
        bounds: workload.bounds(),
        replicas: run
            .cluster
            .replicas()
            .into_iter()
            .map(|id| format!("r{id}"))
            .collect(),
        // All replicas were restarted since clients ended, and agree: no request is under way.
        settled: !course.broken_off && course.diverged.is_none(),
        ..Facts::default()
    };
    facts.bounds.insert("late_ms".to_owned(), course.late_ms as f64);
    workload.tell(&mut facts);
    Kept {
        settings: run.settings.clone(),
        nemeses,
        ground,
        fabric: run.net.name().to_owned(),
        floors: workload.floors().iter().map(|name| (*name).to_owned()).collect(),
        facts,
        setting: setting(run, &course),
        course,
        ended: ended.collect(),
        claims: claims.collect(),
        began,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// A history that breaks its own rules is the harness's failure: no verdict can be built on it.
fn sound(history: &History) -> Result<()> {
    let problems = history.problems();
    match problems.first() {
        None => Ok(()),
        Some(first) => bail!(
            "the harness wrote a history that breaks its rules ({} places): {first}",
            problems.len()
        ),
    }
}

/// When what was wrong, for checkers that have bounds.
fn setting(run: &Run, course: &Course) -> Setting {
    let window = |done: &Done| Window {
        from: done.began,
        to: done.ended,
        name: done.step.nemesis.clone(),
        isolated: done.isolated.iter().map(|id| format!("r{id}")).collect(),
    };
    let mut faults: Vec<Window> = course
        .faults
        .iter()
        .filter(|done| done.ended > done.began)
        .map(window)
        .collect();
    let history = run.record.history();
    let spans = crate::floors::phases(&history);
    if let Some(last) = spans.get(&Phase::Final) {
        faults.push(Window {
            from: last.from,
            to: history.healed().unwrap_or(last.to),
            name: "restart of all".to_owned(),
            isolated: Vec::new(),
        });
    }
    let now = run.record.clock().nanos() / 1_000_000;
    Setting {
        faults,
        epoch_ms: Some(palyra_client::wall_ms().saturating_sub(now)),
        end: spans.get(&Phase::After).map_or(0, |span| span.to),
        ..Setting::default()
    }
}

/// Ends the replicas, and keeps their data when that was asked for.
async fn end(run: &Run, results: &Results, data: &Path, folder: &Path) -> Result<()> {
    let stops = run
        .cluster
        .replicas()
        .into_iter()
        .map(|id| async move { drop(run.cluster.kill(id).await) });
    futures::future::join_all(stops).await;
    let kept = run.settings.keep == "always" || results.valid != Some(true);
    let target = folder.join("data");
    if kept && data != target {
        let (from, to) = (data.display().to_string(), target.display().to_string());
        crate::net::tool(&["cp", "-a", &from, &to], "")
            .await
            .context("keeping the data folders")?;
    } else if !kept && data == target {
        tokio::fs::remove_dir_all(data).await?;
    }
    Ok(())
}

pub(crate) fn tell_checks(results: &Results) {
    for check in &results.checks {
        let (word, rest) = match &check.outcome {
            palyra_jepsen_check::Outcome::Valid => ("ok      ", String::new()),
            palyra_jepsen_check::Outcome::Unknown { why } => ("unknown ", format!(": {why}")),
            palyra_jepsen_check::Outcome::Invalid { violations } => {
                let first = violations
                    .first()
                    .map(|violation| violation.what.as_str())
                    .unwrap_or_default();
                ("VIOLATED", format!(": {first} ({} in all)", violations.len()))
            }
        };
        println!("{word} {}{rest}", check.name);
    }
    if results.starved {
        println!(
            "the harness itself was late by {} ms: this machine is too busy for times to mean much",
            results.late_ms
        );
    }
}

/// One line that is written over and over.
async fn progress(run: Arc<Run>, stop: CancellationToken) {
    let began = std::time::Instant::now();
    loop {
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(500)) => {},
            () = stop.cancelled() => break,
        }
        let phase = match run.phase() {
            Phase::Prepare => "preparing",
            Phase::Before => "quiet",
            Phase::Faults => "faults",
            Phase::After => "healed",
            Phase::Final | Phase::Over => "last reads",
        };
        let glance = run.record.since(0, judge::glance);
        let leader = run
            .leaders
            .now()
            .map_or_else(|| "nobody".to_owned(), |leader| format!("r{}", leader.replica));
        eprint!(
            "\r\x1b[K{:>5}s {phase:<10} ok {} fail {} info {}  {leader} leads",
            began.elapsed().as_secs(),
            glance["ok"],
            glance["fail"],
            glance["info"]
        );
    }
    eprint!("\r\x1b[K");
}
