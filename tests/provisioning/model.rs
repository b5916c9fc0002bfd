//! Random sequences of calls, faults and restarts, checked against a small model of what each chip holds.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use spp::provisioning::ProvisionError;
use spp::store::{LogReader as _, SessionCounts, SessionReader as _, StateName};
use spp_format::names::SessionId;
use spp_format::record::{Publication, PublishedRecord};
use spp_testkit::random::cases;

use spp_testkit::point::device::{Kind, TestDevice, identity_of};
use spp_testkit::point::faulty_stores::FaultMode;
use spp_testkit::point::{Point, TestBed};

/// Number of sequences. Each uses the real HSM and real stores.
const CASES: u32 = 8;
const CHIPS: usize = 3;
const IDENTITIES: u32 = 3;

#[derive(Debug, Clone)]
enum Step {
    Assemble { chip: usize, identity: u32 },
    Complete { chip: usize },
    Abort { chip: usize },
    Restart,
    FaultMode { nth: usize, mode: FaultMode },
}

#[test]
fn random_calls_faults_and_restarts_match_model() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let testbed = runtime.block_on(TestBed::new());
    let config = Config { max_shrink_iters: 200, source_file: Some(file!()), ..cases(CASES, 15 * CASES) };
    let sequences = proptest::collection::vec(step(), 1..24);
    let outcome = TestRunner::new(config).run(&sequences, |steps| {
        // The model asserts; its output names the failing step.
        runtime.block_on(async {
            let mut run = Run::new(&testbed);
            for step in &steps {
                println!("{step:?}");
                run.take(step).await;
                run.check().await;
            }
        });
        Ok(())
    });
    outcome.unwrap();
}

fn step() -> impl Strategy<Value = Step> {
    let mode = prop_oneof![Just(FaultMode::Failed), Just(FaultMode::FailedButPersisted)];
    prop_oneof![
        6 => (0..CHIPS, 0..IDENTITIES).prop_map(|(chip, identity)| Step::Assemble { chip, identity }),
        5 => (0..CHIPS).prop_map(|chip| Step::Complete { chip }),
        2 => (0..CHIPS).prop_map(|chip| Step::Abort { chip }),
        2 => Just(Step::Restart),
        3 => (0..3usize, mode).prop_map(|(nth, mode)| Step::FaultMode { nth, mode }),
    ]
}

/// What a chip holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holds {
    Nothing,
    /// A session that may be completed or aborted.
    Open(u32, SessionId),
    /// A public record. The journal may not have the publication yet.
    Public(u32, SessionId, Publication),
}

impl Holds {
    const fn identity(self) -> Option<u32> {
        match self {
            Self::Nothing => None,
            Self::Open(identity, _) | Self::Public(identity, ..) => Some(identity),
        }
    }

    const fn session(self) -> Option<SessionId> {
        match self {
            Self::Nothing => None,
            Self::Open(_, session) | Self::Public(_, session, _) => Some(session),
        }
    }
}

struct Run<'a> {
    point: Point<'a>,
    devices: Vec<TestDevice>,
    holds: [Holds; CHIPS],
    /// Every delivered pair, and its chip.
    pairs: BTreeMap<Vec<u8>, usize>,
}

impl<'a> Run<'a> {
    fn new(testbed: &'a TestBed) -> Self {
        let mut devices: Vec<_> = (0..3).map(|chip| TestDevice::new(testbed, Kind::Phone, chip)).collect();
        // The flash images are files: wipe data of earlier sequences.
        devices.iter_mut().for_each(|device| device.device.wipe().unwrap());
        Self { point: testbed.point(), devices, holds: [Holds::Nothing; CHIPS], pairs: BTreeMap::new() }
    }

    async fn take(&mut self, step: &Step) {
        match *step {
            Step::Assemble { chip, identity } => self.assemble(chip, identity).await,
            Step::Complete { chip } if !self.devices[chip].delivered.is_empty() => self.complete(chip).await,
            Step::Abort { chip } if !self.devices[chip].delivered.is_empty() => self.abort(chip).await,
            Step::Complete { .. } | Step::Abort { .. } => {}
            Step::Restart => assert_eq!(self.point.restart().await.failed, 0),
            Step::FaultMode { nth, mode } => self.point.faults.fail_nth(nth, mode),
        }
    }

    async fn assemble(&mut self, chip: usize, identity: u32) {
        let before = self.holds[chip];
        let on_other_chip = (0..CHIPS).any(|other| other != chip && self.holds[other].identity() == Some(identity));
        self.devices[chip].identity = identity_of(Kind::Phone, identity);
        match (before, self.devices[chip].assemble(&self.point).await) {
            (Holds::Nothing, Ok(installed)) => {
                assert!(!on_other_chip, "the identity is on another chip");
                self.holds[chip] = Holds::Open(identity, installed.session);
                self.note_pair(chip, installed.public_key.unwrap().spki_der());
            }
            (Holds::Nothing, Err(ProvisionError::IdentityTaken { .. })) => assert!(on_other_chip),
            // A repeated call, also while the journal does not have the publication.
            (Holds::Open(same, session) | Holds::Public(same, session, _), Ok(installed)) => {
                assert_eq!((same, session), (identity, installed.session));
                self.note_pair(chip, installed.public_key.unwrap().spki_der());
            }
            (Holds::Public(same, ..), Err(ProvisionError::AlreadyComplete { .. })) => assert_eq!(same, identity),
            (Holds::Open(other, _) | Holds::Public(other, ..), Err(ProvisionError::ChipTaken { .. })) => {
                assert_ne!(other, identity);
            }
            (_, Err(ProvisionError::Store(_))) => self.read_state(chip, identity).await,
            (before, Err(error)) => panic!("{before:?}: {error}"),
        }
    }

    async fn complete(&mut self, chip: usize) {
        let device = &self.devices[chip];
        let session = device.delivered.last().unwrap().0;
        let held = self.holds[chip].session() == Some(session);
        match (self.holds[chip], device.complete(&self.point).await) {
            (Holds::Open(identity, _), Ok(publication)) => {
                assert!(held);
                self.holds[chip] = Holds::Public(identity, session, publication);
            }
            (Holds::Public(_, _, first), Ok(publication)) => assert_eq!((held, publication), (true, first)),
            (_, Err(ProvisionError::WrongState { state: StateName::Aborted, .. })) => assert!(!held),
            (before, Err(ProvisionError::Store(_))) => self.read_state(chip, before.identity().unwrap()).await,
            (before, outcome) => panic!("{before:?}: {outcome:?}"),
        }
    }

    async fn abort(&mut self, chip: usize) {
        let device = &self.devices[chip];
        let held = self.holds[chip].session() == Some(device.delivered.last().unwrap().0);
        match (self.holds[chip], device.abort(&self.point).await) {
            (Holds::Open(..), Ok(())) if held => self.holds[chip] = Holds::Nothing,
            (_, Ok(())) => assert!(!held, "a repeat"),
            (Holds::Public(..), Err(ProvisionError::WrongState { .. })) => assert!(held),
            (before, Err(ProvisionError::Store(_))) => self.read_state(chip, before.identity().unwrap()).await,
            (before, Err(error)) => panic!("{before:?}: {error}"),
        }
    }

    /// After a failed call the chip holds its previous state, or the state after the call. The stores show which.
    async fn read_state(&mut self, chip: usize, identity: u32) {
        let device = &self.devices[chip];
        let record = self.point.record_of(&device.chip).await;
        let session = device.session(&self.point).await.filter(|session| session.state.name() != StateName::Aborted);
        let now = match (record, session) {
            (Some(found), _) => Holds::Public(identity, found.record.session, found.publication),
            (None, Some(session)) => Holds::Open(identity, session.id),
            (None, None) => Holds::Nothing,
        };
        let before = self.holds[chip];
        let possible = match (before, now) {
            (Holds::Nothing, Holds::Public(..)) | (Holds::Public(..), _) => before == now,
            (Holds::Open(_, held), _) => now.session().is_none_or(|session| session == held),
            (Holds::Nothing, _) => true,
        };
        assert!(possible, "{before:?} became {now:?}");
        self.holds[chip] = now;
    }

    fn note_pair(&mut self, chip: usize, public_key: &[u8]) {
        let first = *self.pairs.entry(public_key.to_vec()).or_insert(chip);
        assert_eq!(first, chip, "a pair was delivered to two chips");
    }

    /// Asserts that the stores match the model exactly.
    async fn check(&self) {
        let (mut records, mut open) = (0, 0);
        for (device, holds) in self.devices.iter().zip(self.holds) {
            let session = device.session(&self.point).await.filter(|s| s.state.name() != StateName::Aborted);
            assert_eq!(session.as_ref().map(|session| session.id), holds.session());
            let record = self.point.record_of(&device.chip).await;
            let publication = record.as_ref().map(|found| found.publication);
            assert_eq!(
                publication,
                if let Holds::Public(_, _, publication) = holds { Some(publication) } else { None }
            );
            records += u64::from(record.is_some());
            if let Some(session) = session {
                open += usize::from(!session.state.is_final());
                let identity = identity_of(Kind::Phone, holds.identity().unwrap());
                assert_eq!(session.identity, identity);
                let fits =
                    |found: PublishedRecord| found.record.identity == identity && found.record.session == session.id;
                assert!(record.is_none_or(fits));
                device.assert_key_stored_until_final(&self.point).await;
            }
        }
        assert_eq!(self.point.public().len().await.unwrap(), records);
        assert_eq!(self.point.state().unfinished().await.unwrap().len(), open);
        self.check_identities_and_counts().await;
    }

    async fn check_identities_and_counts(&self) {
        for identity in 0..IDENTITIES {
            let held = self.holds.iter().find(|holds| holds.identity() == Some(identity));
            let session = self.point.state().session_of_identity(&identity_of(Kind::Phone, identity)).await.unwrap();
            assert_eq!(session.map(|session| session.id), held.and_then(|holds| holds.session()));
        }
        let SessionCounts { reserved, issued, published, erased, aborted: _ } =
            self.point.state().counts().await.unwrap();
        let holding = self.holds.iter().filter(|holds| **holds != Holds::Nothing).count();
        assert_eq!(reserved + issued + published + erased, holding as u64);
    }
}
