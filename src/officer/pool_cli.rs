//! `sppctl pool`: arguments, progress bars and output.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use spp_format::keys::KeyType;
use spp_proto as proto;

use super::pool::{describe_pool, fill_pool, pool_json, pool_status, shred_pool, shredded_json};
use super::status::StatusError;
use crate::keypool::MAX_POOL_PAIRS;

/// Show, fill and shred the pools of pregenerated key pairs.
#[derive(Subcommand)]
pub enum PoolCommand {
    /// Show ready and reserved pairs, fill rate (pairs/s), age, batches and the next shredding, per key type.
    Status {
        /// Connection to the daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Fill one pool or all pools and wait until they are full. If interrupted, the daemon continues.
    Fill {
        /// Key type: p256, p384, ed25519, rsa-2048, rsa-3072 or rsa-4096 [default: all pools].
        kind: Option<KeyType>,
        /// Number of ready pairs to reach, instead of the pool's high mark.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=MAX_POOL_PAIRS))]
        to: Option<u64>,
        /// Connection to the daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Shred erased pairs now: rewrap the remaining pairs of their batches inside the HSM and destroy the old batch keys.
    Shred {
        /// Key type whose batches to shred [default: all, including the batches of pairs generated on demand].
        kind: Option<KeyType>,
        /// Also discard the ready pairs of quarantined batches and shred these batches.
        #[arg(long)]
        quarantined: bool,
        /// Connection to the daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
}

/// Connection to the daemon and output format.
#[derive(Args)]
pub struct DaemonArgs {
    /// URL of the daemon's officer listener, https://HOST:PORT.
    #[arg(long, value_name = "URL")]
    pub(super) server: String,
    /// Directory with the officer's certificate.pem, key.pem and ca.pem.
    #[arg(long, value_name = "DIR")]
    pub(super) tls: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
}

impl PoolCommand {
    /// Runs the command. Results go to standard output; progress goes to standard error if that is a terminal.
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
                let request = proto::FillPoolRequest { kind: kind_name(kind), to: to.unwrap_or(0) };
                let mut bars = Bars::default();
                fill_pool(&daemon.server, &daemon.tls, request, |step| bars.update(step)).await?;
                bars.finish();
                let status = pool_status(&daemon.server, &daemon.tls).await?;
                match daemon.json {
                    true => println!("{:#}", pool_json(&status)),
                    false => print!("{}", describe_pool(&status)),
                }
            }
            Self::Shred { kind, quarantined, daemon } => {
                let request = proto::ShredPoolRequest { kind: kind_name(kind), quarantined };
                let bar = progress_bar("batches");
                let on_step = |step: &proto::ShredPoolResponse| {
                    bar.set_length(step.batches);
                    bar.set_position(step.batches_done);
                };
                let last = shred_pool(&daemon.server, &daemon.tls, request, on_step).await?;
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

fn kind_name(kind: Option<KeyType>) -> String {
    kind.map(|kind| kind.to_string()).unwrap_or_default()
}

fn describe_shredding(last: &proto::ShredPoolResponse) -> String {
    if last.batches_done == 0 {
        return "nothing to shred: no pair was erased since the last shredding".to_owned();
    }
    let discarded = if last.discarded > 0 { format!(", {} pairs discarded", last.discarded) } else { String::new() };
    format!("{} batch keys destroyed, {} pairs rewrapped{discarded}", last.batches_done, last.moved)
}

/// One progress bar per key type.
#[derive(Default)]
struct Bars {
    all: MultiProgress,
    kinds: BTreeMap<String, ProgressBar>,
}

impl Bars {
    fn update(&mut self, step: &proto::FillPoolResponse) {
        if step.kind.is_empty() {
            return;
        }
        let all = &self.all;
        let bar = self.kinds.entry(step.kind.clone()).or_insert_with(|| all.add(progress_bar(&step.kind)));
        bar.set_length(step.target);
        bar.set_position(step.ready);
        bar.set_message(match step.paused.as_str() {
            "" => format!("{:.1}/s", step.fill_rate_per_second),
            reason => format!("paused: {reason}"),
        });
    }

    fn finish(&self) {
        for bar in self.kinds.values() {
            bar.finish_and_clear();
        }
    }
}

/// Creates a progress bar. Indicatif draws on standard error, and only if that is a terminal.
fn progress_bar(label: &str) -> ProgressBar {
    let bar = ProgressBar::new(0).with_prefix(label.to_owned());
    if let Ok(style) = ProgressStyle::with_template("{prefix:<10} {bar:40} {pos}/{len} {msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}
