//! `sppctl pool`: its arguments, and what people see of a filling or a shredding while it goes on.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::pool::{describe_pool, fill_pool, pool_json, pool_status, shred_pool, shredded_json};
use super::status::StatusError;
use crate::keypool::MOST_PAIRS;
use crate::keys::KeyKind;
use crate::proto;

/// Key pairs that are made in advance.
#[derive(Subcommand)]
pub enum PoolCommand {
    /// Tell how the pools stand: ready, reserved, fill rate, age, batches, next shred.
    Status {
        /// Which daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Fill a pool now, or all of them, and wait until that is done. Interrupted, the daemon goes on.
    Fill {
        /// p256, p384, ed25519, rsa-2048, rsa-3072 or rsa-4096; every pool if left out.
        kind: Option<KeyKind>,
        /// Up to so many pairs, instead of the high mark.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=MOST_PAIRS))]
        to: Option<u64>,
        /// Which daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Shred now what was erased: what is left of its batches is rewrapped inside the HSM, the old keys are destroyed.
    Shred {
        /// Batches of this kind alone; all, those of pairs made on the spot included, if left out.
        kind: Option<KeyKind>,
        /// Give up the ready pairs of quarantined batches, and shred those, too.
        #[arg(long)]
        quarantined: bool,
        /// Which daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
}

/// The running daemon, and how its answer is told.
#[derive(Args)]
pub struct DaemonArgs {
    /// The officer listener, https://HOST:PORT.
    #[arg(long, value_name = "URL")]
    pub(super) server: String,
    /// The officer's directory with certificate.pem, key.pem and ca.pem.
    #[arg(long, value_name = "DIR")]
    pub(super) tls: PathBuf,
    /// Tell it as JSON.
    #[arg(long)]
    pub(super) json: bool,
}

impl PoolCommand {
    /// Does it; what is told goes to standard output, progress to standard error where that is a terminal.
    pub async fn run(self) -> Result<(), StatusError> {
        match self {
            Self::Status { daemon } => {
                let status = pool_status(&daemon.server, &daemon.tls).await?;
                match daemon.json {
                    true => println!("{:#}", pool_json(&status)),
                    false => print!("{}", describe_pool(&status)),
                }
            }
            Self::Fill { kind, to, daemon } => {
                let request = proto::FillPoolRequest { kind: name(kind), to: to.unwrap_or(0) };
                let mut bars = Bars::default();
                fill_pool(&daemon.server, &daemon.tls, request, |step| bars.tell(step)).await?;
                bars.end();
                let status = pool_status(&daemon.server, &daemon.tls).await?;
                match daemon.json {
                    true => println!("{:#}", pool_json(&status)),
                    false => print!("{}", describe_pool(&status)),
                }
            }
            Self::Shred { kind, quarantined, daemon } => {
                let request = proto::ShredPoolRequest { kind: name(kind), quarantined };
                let bar = bar("batches");
                let tell = |step: &proto::ShredPoolResponse| {
                    bar.set_length(step.batches);
                    bar.set_position(step.batches_done);
                };
                let last = shred_pool(&daemon.server, &daemon.tls, request, tell).await?;
                bar.finish_and_clear();
                match daemon.json {
                    true => println!("{:#}", shredded_json(&last)),
                    false => println!("{}", describe_shredding(&last)),
                }
            }
        }
        Ok(())
    }
}

fn name(kind: Option<KeyKind>) -> String {
    kind.map(|kind| kind.to_string()).unwrap_or_default()
}

fn describe_shredding(last: &proto::ShredPoolResponse) -> String {
    if last.batches_done == 0 {
        return "nothing was erased since the last time: there is nothing to shred".to_owned();
    }
    let given_up = if last.discarded > 0 { format!(", {} pairs given up", last.discarded) } else { String::new() };
    format!("{} batch keys destroyed, {} pairs rewrapped{given_up}", last.batches_done, last.moved)
}

/// One bar for each kind.
#[derive(Default)]
struct Bars {
    all: MultiProgress,
    kinds: BTreeMap<String, ProgressBar>,
}

impl Bars {
    fn tell(&mut self, step: &proto::FillPoolResponse) {
        if step.kind.is_empty() {
            return;
        }
        let all = &self.all;
        let bar = self.kinds.entry(step.kind.clone()).or_insert_with(|| all.add(bar(&step.kind)));
        bar.set_length(step.target);
        bar.set_position(step.ready);
        bar.set_message(match step.paused.as_str() {
            "" => format!("{:.1}/s", step.fill_rate_per_second),
            why => format!("paused: {why}"),
        });
    }

    fn end(&self) {
        for bar in self.kinds.values() {
            bar.finish_and_clear();
        }
    }
}

/// Indicatif draws on standard error, and only where that is a terminal.
fn bar(what: &str) -> ProgressBar {
    let bar = ProgressBar::new(0).with_prefix(what.to_owned());
    if let Ok(style) = ProgressStyle::with_template("{prefix:<10} {bar:40} {pos}/{len} {msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}
