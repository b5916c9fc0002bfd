//! Witnesses see a log grow, and hold nothing up. The one here does what C2SP tlog-witness says and nothing else.

use std::convert::Infallible;
use std::sync::Mutex;

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use axum::body::Body;
use base64::prelude::{BASE64_STANDARD, Engine as _};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::*;
use crate::tlog::{LogKey, TlogError, WitnessKey, check_consistency};

const NAME: &str = "witness.example/w1";

/// How it behaves.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Honest,
    Garbage,
    WrongSignature,
    Broken,
    NoSize,
    Silent,
}

struct Notary {
    name: &'static str,
    pair: Ed25519KeyPair,
    logs: Vec<LogKey>,
    /// It keeps what it saw last in a file, as it must before it answers: `SIZE ROOT`.
    seen: tempfile::NamedTempFile,
    mood: Mutex<Mood>,
    /// What it answered.
    answers: Mutex<Vec<u16>>,
}

impl Notary {
    fn new(name: &'static str, logs: &[&LogKey]) -> Arc<Self> {
        Arc::new(Self {
            name,
            pair: Ed25519KeyPair::generate().unwrap(),
            logs: logs.iter().map(|key| (*key).clone()).collect(),
            seen: tempfile::NamedTempFile::new().unwrap(),
            mood: Mutex::new(Mood::Honest),
            answers: Mutex::default(),
        })
    }

    fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn answers(&self) -> Vec<u16> {
        self.answers.lock().unwrap().clone()
    }

    /// SHA-256(name ‖ 0x0A ‖ type ‖ public key), its first four bytes.
    fn key_id(&self) -> [u8; 4] {
        let text = [self.name.as_bytes(), b"\n", &[4], self.pair.public_key().as_ref()].concat();
        Sha256::digest(text)[..4].try_into().unwrap()
    }

    fn key(&self) -> WitnessKey {
        let public = BASE64_STANDARD.encode([&[4], self.pair.public_key().as_ref()].concat());
        format!("{}+{}+{public}", self.name, hex::encode(self.key_id())).parse().unwrap()
    }

    fn seen(&self) -> (u64, [u8; 32]) {
        let text = fs::read_to_string(self.seen.path()).unwrap();
        let Some((size, root)) = text.split_once(' ') else { return (0, Tree::default().root()) };
        (size.parse().unwrap(), hex::decode(root).unwrap().try_into().unwrap())
    }

    /// Status, type and body.
    fn add_checkpoint(&self, body: &str) -> (u16, &'static str, String) {
        let plain = |status: u16| (status, "text/plain", String::new());
        let Some((head, note)) = body.split_once("\n\n") else { return plain(400) };
        let mut lines = head.split('\n');
        let old = lines.next().and_then(|line| line.strip_prefix("old "));
        let old = old.and_then(|digits| digits.parse::<u64>().ok().filter(|old| old.to_string() == digits));
        let hash = |line| BASE64_STANDARD.decode(line).ok().and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
        let proof = lines.map(hash).collect::<Option<Vec<_>>>().filter(|proof| proof.len() <= 63);
        let (Some(old), Some(proof)) = (old, proof) else { return plain(400) };
        let Some(key) = self.logs.iter().find(|key| note.starts_with(&format!("{}\n", key.origin()))) else {
            return plain(404);
        };
        let checkpoint = match SignedCheckpoint::verify(note.as_bytes(), key) {
            Ok(checkpoint) => checkpoint,
            Err(TlogError::Malformed { .. }) => return plain(400),
            Err(_) => return plain(403),
        };
        if old > checkpoint.size() {
            return plain(400);
        }
        let (size, root) = self.seen();
        if old != size {
            return (409, "text/x.tlog.size", format!("{size}\n"));
        }
        if size == checkpoint.size() && root != checkpoint.root() {
            return plain(409);
        }
        let grown = size < checkpoint.size();
        let consistent = match (old, grown) {
            (0, _) | (_, false) => proof.is_empty(),
            _ => check_consistency(&proof, (checkpoint.size(), checkpoint.root()), (size, root)).is_ok(),
        };
        if !consistent {
            return plain(422);
        }
        fs::write(self.seen.path(), format!("{} {}", checkpoint.size(), hex::encode(checkpoint.root()))).unwrap();
        (200, "text/plain", self.cosignature(note))
    }

    fn cosignature(&self, note: &str) -> String {
        let text = &note[..note.find("\n\n").unwrap() + 1];
        let time = 1_767_225_600u64;
        let mut signature = self.pair.sign(format!("cosignature/v1\ntime {time}\n{text}").as_bytes()).as_ref().to_vec();
        signature[0] ^= u8::from(*self.mood.lock().unwrap() == Mood::WrongSignature);
        let bytes = [&self.key_id()[..], &time.to_be_bytes(), &signature].concat();
        format!("— {} {}\n", self.name, BASE64_STANDARD.encode(bytes))
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let right = request.method() == "POST" && request.uri().path() == "/w1/add-checkpoint";
        let body = axum::body::to_bytes(Body::new(request.into_body()), 1 << 20).await.unwrap();
        let mood = *self.mood.lock().unwrap();
        let (status, kind, body) = match mood {
            _ if !right => (405, "text/plain", String::new()),
            Mood::Honest | Mood::WrongSignature => self.add_checkpoint(std::str::from_utf8(&body).unwrap()),
            Mood::Garbage => (200, "text/html", "<p>Welcome — to\n— \n— witness.example/w1 AAAA\n".to_owned()),
            Mood::Broken => (500, "text/plain", "oh".to_owned()),
            Mood::NoSize => (409, "text/plain", "many\n".to_owned()),
            Mood::Silent => std::future::pending().await,
        };
        self.answers.lock().unwrap().push(status);
        let answer = Response::builder().status(StatusCode::from_u16(status).unwrap());
        answer.header(header::CONTENT_TYPE, kind).body(Body::from(body)).unwrap()
    }

    /// Listens, until the task is ended.
    async fn serve(self: &Arc<Self>) -> (Witness, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/w1", listener.local_addr().unwrap());
        let notary = Arc::clone(self);
        let task = tokio::spawn(async move {
            // They end with it.
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let notary = Arc::clone(&notary);
                connections.spawn(async move {
                    let answer = service_fn(|request| async { Ok::<_, Infallible>(notary.answer(request).await) });
                    let _ =
                        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
                });
            }
        });
        (Witness { url, key: self.key(), authority: None }, task)
    }
}

fn settings(witnesses: &[&Witness]) -> LogSettings {
    LogSettings { witnesses: witnesses.iter().map(|witness| (*witness).clone()).collect(), ..LogSettings::default() }
}

async fn open(log: &Log, witnesses: &[&Witness]) -> Arc<TransparencyLog> {
    log.open_with(log.signer.clone(), settings(witnesses)).await
}

/// The checkpoint of that size with the cosignatures of these, and no other.
async fn until_cosigned(log: &Log, public: &TransparencyLog, size: u64, by: &[&WitnessKey]) {
    let names: Vec<_> = by.iter().map(|key| key.name()).collect();
    let checkpoint = eventually("the checkpoint is cosigned", async || {
        let checkpoint = public.checkpoint().await.unwrap().unwrap();
        let is_cosigned = checkpoint.size() == size && checkpoint.cosigners(by) == names;
        if is_cosigned { Ok(checkpoint) } else { Err((checkpoint, public.status().witnesses)) }
    })
    .await;
    assert_eq!(SignedCheckpoint::verify(checkpoint.note(), log.signer.key()).unwrap().root(), checkpoint.root());
    let signatures = std::str::from_utf8(checkpoint.note()).unwrap().matches("\n— ").count();
    assert_eq!(signatures, 1 + by.len());
}

async fn until_told(public: &TransparencyLog, name: &str, words: &str) {
    eventually(words, async || {
        let of_it = public.status().witnesses.into_iter().find(|status| status.name == name);
        of_it.and_then(|status| status.trouble).is_some_and(|why| why.contains(words))
    })
    .await;
}

fn is_well(public: &TransparencyLog, name: &str, size: u64) -> bool {
    public.status().witnesses.contains(&WitnessStatus { name: name.to_owned(), size, trouble: None })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checkpoints_and_proofs_carry_the_cosignature_and_a_restarted_log_goes_on() {
    let log = Log::new();
    let notary = Notary::new(NAME, &[log.signer.key()]);
    let (witness, _task) = notary.serve().await;
    let key = notary.key();
    let public = open(&log, &[&witness]).await;
    let mut size = 0;
    for next in [1, 5, 300] {
        let told = grow(&public, size..next).await;
        size = next;
        // Nobody waits for the witness: the proof is there at once, with or without it.
        for (n, publication) in &told {
            must_be_proven(&log, &public, *n, publication).await;
        }
        until_cosigned(&log, &public, size, &[&key]).await;
        assert!(is_well(&public, NAME, size));
        let proof = public.prove(size - 1).await.unwrap().unwrap();
        let bytes = public.record(size - 1).await.unwrap().unwrap().bytes;
        let proven = proof.verify(&bytes, log.signer.key()).unwrap();
        assert_eq!(proven.checkpoint.cosigners(&[&key]), [NAME]);
    }
    assert_eq!(notary.answers(), [200, 200, 200], "it never forgot what the witness knows");
    assert_eq!(notary.seen().0, 300);
    drop(public);
    // It asks about the same tree, and then about a larger one, without knowing what the witness has seen.
    let public = open(&log, &[&witness]).await;
    until_cosigned(&log, &public, 300, &[&key]).await;
    assert_eq!(notary.answers()[3..], [409, 200]);
    drop(public);
    let unwatched = log.open().await;
    grow(&unwatched, 300..310).await;
    drop(unwatched);
    let public = open(&log, &[&witness]).await;
    until_cosigned(&log, &public, 310, &[&key]).await;
    assert_eq!(notary.answers()[5..], [409, 200]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_witness_that_is_away_or_answers_nonsense_holds_nothing_up_and_is_told() {
    let log = Log::new();
    let notary = Notary::new(NAME, &[log.signer.key()]);
    let (witness, task) = notary.serve().await;
    let public = open(&log, &[&witness]).await;
    let moods = [
        (Mood::Garbage, "its cosignature does not verify"),
        (Mood::WrongSignature, "its cosignature does not verify"),
        (Mood::Broken, "it answers 500"),
        (Mood::NoSize, "it answers 409 without a size"),
        (Mood::Silent, "timeout"),
    ];
    for (n, (mood, words)) in (0..).zip(moods) {
        notary.set(mood);
        let told = grow(&public, [n]).await;
        must_be_there(&log, &public, &told).await;
        until_told(&public, NAME, words).await;
        until_cosigned(&log, &public, n + 1, &[]).await;
    }
    notary.set(Mood::Honest);
    grow(&public, 5..6).await;
    until_cosigned(&log, &public, 6, &[&notary.key()]).await;
    assert!(is_well(&public, NAME, 6));
    task.abort();
    let _ = task.await;
    let told = grow(&public, 6..7).await;
    eventually("its trouble", async || public.status().witnesses[0].trouble.is_some()).await;
    must_be_there(&log, &public, &told).await;
    until_cosigned(&log, &public, 7, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_witnesses_the_one_that_is_there_cosigns() {
    let log = Log::new();
    let (there, away) =
        (Notary::new(NAME, &[log.signer.key()]), Notary::new("witness.example/w2", &[log.signer.key()]));
    let ((one, _task), (two, task)) = (there.serve().await, away.serve().await);
    let public = open(&log, &[&two, &one]).await;
    grow(&public, 0..3).await;
    until_cosigned(&log, &public, 3, &[&there.key(), &away.key()]).await;
    task.abort();
    let _ = task.await;
    grow(&public, 3..5).await;
    until_cosigned(&log, &public, 5, &[&there.key()]).await;
    assert!(is_well(&public, NAME, 5));
    let status = public.status().witnesses.into_iter().find(|status| status.name == "witness.example/w2").unwrap();
    assert!(status.trouble.is_some() && status.size == 3, "{status:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_witness_that_saw_another_log_refuses_and_that_is_told() {
    // Two logs of one key and one name: the case that witnesses are there for.
    let one = Log::new();
    let notary = Notary::new(NAME, &[one.signer.key()]);
    let (witness, _task) = notary.serve().await;
    let public = open(&one, &[&witness]).await;
    grow(&public, 0..5).await;
    until_cosigned(&one, &public, 5, &[&notary.key()]).await;
    drop(public);
    for (size, words) in [
        (3, "it knows a tree of 5 entries"),
        (7, "it found the checkpoint inconsistent with what it has seen (422)"),
        (5, "it answers 409 without a size"),
    ] {
        let other = Log { signer: one.signer.clone(), ..Log::new() };
        let public = open(&other, &[&witness]).await;
        let told = grow(&public, 100..100 + size).await;
        until_told(&public, NAME, words).await;
        until_cosigned(&other, &public, size, &[]).await;
        must_be_there(&other, &public, &told).await;
    }
    assert_eq!(notary.seen().0, 5, "it has cosigned nothing else");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_witness_that_does_not_know_the_log_or_its_key_is_told() {
    let log = Log::new();
    let (same_name, foreign) = (LocalSigner::new(ORIGIN), LocalSigner::new("log.example/other"));
    let (wrong_key, no_log) =
        (Notary::new(NAME, &[same_name.key()]), Notary::new("witness.example/w2", &[foreign.key()]));
    let ((one, _one), (two, _two)) = (wrong_key.serve().await, no_log.serve().await);
    let public = open(&log, &[&one, &two]).await;
    grow(&public, 0..2).await;
    until_told(&public, NAME, "it does not accept the log's signature (403)").await;
    until_told(&public, "witness.example/w2", "it does not know this log (404)").await;
    until_cosigned(&log, &public, 2, &[]).await;
}
