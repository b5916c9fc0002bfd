//! Runs the fuzz targets of `fuzz/` briefly on damaged samples, with every test run.
//!
//! `SPP_WRITE_SEEDS=1 cargo test --test integration parsers` writes the samples to `fuzz/corpus/`, as seeds for libFuzzer.

#[allow(unreachable_pub, reason = "a separate crate in fuzz/")]
#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use std::path::Path;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};
use spp_testkit::random::cases;

/// Damaged samples per parser. All together take about two seconds in a debug build.
const CASES: u32 = 1500;

#[test]
fn samples_accepted_by_their_parser() {
    for target in fuzz::TARGETS {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target.name);
        for (n, sample) in (target.samples)().iter().enumerate() {
            assert!((target.parse)(sample), "sample {n} of {}", target.name);
            if std::env::var_os("SPP_WRITE_SEEDS").is_some() {
                std::fs::create_dir_all(&corpus).unwrap();
                std::fs::write(corpus.join(format!("sample-{n}")), sample).unwrap();
            }
        }
    }
}

#[test]
fn every_parser_has_libfuzzer_target() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/fuzz_targets");
    let files = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = files.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect();
    let mut names: Vec<_> = fuzz::TARGETS.iter().map(|target| target.name.to_owned()).collect();
    files.sort();
    names.sort();
    assert_eq!(files, names);
}

/// `fuzz/regressions/` contains inputs that made a fuzz target fail, and inputs that reach deep into a parser.
#[test]
fn regression_inputs_do_not_panic() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/regressions");
    let mut tried = 0;
    for target in fuzz::TARGETS {
        for input in std::fs::read_dir(directory.join(target.name)).into_iter().flatten() {
            (target.parse)(&std::fs::read(input.unwrap().path()).unwrap());
            tried += 1;
        }
    }
    assert!(tried > 0, "{} is empty", directory.display());
}

#[test]
fn damaged_samples_do_not_panic_or_violate_assertions() {
    for target in fuzz::TARGETS {
        let samples = (target.samples)();
        let config = Config { source_file: Some(file!()), ..cases(CASES, 40 * CASES) };
        let damaged = (any::<Index>(), vec(damage(), 1..4));
        let outcome = TestRunner::new(config).run(&damaged, |(sample, damages)| {
            let mut bytes = sample.get(&samples).clone();
            damages.iter().for_each(|damage| damage.apply(&mut bytes, &samples));
            (target.parse)(&bytes);
            Ok(())
        });
        outcome.unwrap_or_else(|failure| panic!("{}: {failure}", target.name));
    }
}

#[derive(Debug, Clone)]
enum Damage {
    Flip(Index, u8),
    Set(Index, u8),
    /// Overwrites a CBOR or DER length or count.
    Length(Index, u32),
    Cut(Index),
    Remove(Index, Index),
    Insert(Index, Vec<u8>),
    Repeat(Index, Index),
    /// Appends the end of another sample.
    Splice(Index, Index, Index),
    Replace(Vec<u8>),
}

fn damage() -> impl Strategy<Value = Damage> {
    let index = any::<Index>;
    let significant =
        prop_oneof![Just(0), Just(0x7f), Just(0x80), Just(0x9f), Just(0xbf), Just(0xf6), Just(0xff), any::<u8>()];
    let length = prop_oneof![Just(0), Just(1), Just(u32::MAX), Just(1 << 31), Just(0xffff), any::<u32>()];
    prop_oneof![
        4 => (index(), 0..8u8).prop_map(|(position, bit)| Damage::Flip(position, 1 << bit)),
        4 => (index(), significant).prop_map(|(position, byte)| Damage::Set(position, byte)),
        2 => (index(), length).prop_map(|(position, length)| Damage::Length(position, length)),
        1 => index().prop_map(Damage::Cut),
        2 => (index(), index()).prop_map(|(from, to)| Damage::Remove(from, to)),
        2 => (index(), vec(any::<u8>(), 1..9)).prop_map(|(position, bytes)| Damage::Insert(position, bytes)),
        1 => (index(), index()).prop_map(|(from, to)| Damage::Repeat(from, to)),
        1 => (index(), index(), index()).prop_map(|(position, other, from)| Damage::Splice(position, other, from)),
        1 => vec(any::<u8>(), 0..64).prop_map(Damage::Replace),
    ]
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>, samples: &[Vec<u8>]) {
        let len = bytes.len();
        let place = |position: &Index| position.index(len + 1);
        let range = |from: &Index, to: &Index| place(from).min(place(to))..place(from).max(place(to));
        match self {
            Self::Flip(position, mask) if len > 0 => bytes[position.index(len)] ^= mask,
            Self::Set(position, byte) if len > 0 => bytes[position.index(len)] = *byte,
            Self::Length(position, length) if len > 4 => {
                bytes[position.index(len - 4)..][..4].copy_from_slice(&length.to_be_bytes());
            }
            Self::Flip(..) | Self::Set(..) | Self::Length(..) => {}
            Self::Cut(position) => bytes.truncate(place(position)),
            Self::Remove(from, to) => drop(bytes.drain(range(from, to))),
            Self::Insert(position, new) => drop(bytes.splice(place(position)..place(position), new.iter().copied())),
            Self::Repeat(from, to) => bytes.extend_from_within(range(from, to)),
            Self::Splice(position, other, from) => {
                let other = other.get(samples);
                bytes.truncate(place(position));
                bytes.extend_from_slice(&other[from.index(other.len())..]);
            }
            Self::Replace(new) => bytes.clone_from(new),
        }
    }
}
