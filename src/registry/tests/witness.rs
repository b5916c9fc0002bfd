//! Cosigning with a test witness that implements C2SP tlog-witness. Witnesses never delay publication.

use std::convert::Infallible;
use std::sync::Mutex;

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use axum::body::Body;
use base64::prelude::{BASE64_STANDARD, Engine as _};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use spp_format::tlog::{LogKey, TlogError, WitnessKey, check_consistency};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::*;

const NAME: &str = "witness.example/w1";

/// The behaviour of a test witness.
#[derive(Clone, Copy, PartialEq)]
enum Behaviour {
    Honest,
    Garbage,
    WrongSignature,
    Broken,
    NoSize,
    Silent,
}

struct TestWitness {
    name: &'static str,
    pair: Ed25519KeyPair,
    logs: Vec<LogKey>,
    /// The last cosigned tree, stored before the answer as the specification requires: `SIZE ROOT`.
    seen: tempfile::NamedTempFile,
    behaviour: Mutex<Behaviour>,
    /// The status codes of its answers.
    answers: Mutex<Vec<u16>>,
}

impl TestWitness {
    fn new(name: &'static str, logs: &[&LogKey]) -> Arc<Self> {
        Arc::new(Self {
            name,
            pair: Ed25519KeyPair::generate().unwrap(),
            logs: logs.iter().map(|key| (*key).clone()).collect(),
            seen: tempfile::NamedTempFile::new().unwrap(),
            behaviour: Mutex::new(Behaviour::Honest),
            answers: Mutex::default(),
        })
    }

    fn set(&self, behaviour: Behaviour) {
        *self.behaviour.lock().unwrap() = behaviour;
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

    /// Returns status, content type and body.
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
        signature[0] ^= u8::from(*self.behaviour.lock().unwrap() == Behaviour::WrongSignature);
        let bytes = [&self.key_id()[..], &time.to_be_bytes(), &signature].concat();
        format!("— {} {}\n", self.name, BASE64_STANDARD.encode(bytes))
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let right = request.method() == "POST" && request.uri().path() == "/w1/add-checkpoint";
        let body = axum::body::to_bytes(Body::new(request.into_body()), 1 << 20).await.unwrap();
        let behaviour = *self.behaviour.lock().unwrap();
        let (status, kind, body) = match behaviour {
            _ if !right => (405, "text/plain", String::new()),
            Behaviour::Honest | Behaviour::WrongSignature => self.add_checkpoint(std::str::from_utf8(&body).unwrap()),
            Behaviour::Garbage => (200, "text/html", "<p>Welcome — to\n— \n— witness.example/w1 AAAA\n".to_owned()),
            Behaviour::Broken => (500, "text/plain", "oh".to_owned()),
            Behaviour::NoSize => (409, "text/plain", "many\n".to_owned()),
            Behaviour::Silent => std::future::pending().await,
        };
        self.answers.lock().unwrap().push(status);
        let answer = Response::builder().status(StatusCode::from_u16(status).unwrap());
        answer.header(header::CONTENT_TYPE, kind).body(Body::from(body)).unwrap()
    }

    /// Serves requests until the task ends.
    async fn serve(self: &Arc<Self>) -> (Witness, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/w1", listener.local_addr().unwrap());
        let test_witness = Arc::clone(self);
        let task = tokio::spawn(async move {
            // Connections end with the task.
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let test_witness = Arc::clone(&test_witness);
                connections.spawn(async move {
                    let answer =
                        service_fn(|request| async { Ok::<_, Infallible>(test_witness.answer(request).await) });
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

/// Waits for the checkpoint of this size with the cosignatures of exactly these witnesses.
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

async fn until_reported(public: &TransparencyLog, name: &str, message: &str) {
    eventually(message, async || {
        let of_it = public.status().witnesses.into_iter().find(|status| status.name == name);
        of_it.and_then(|status| status.error).is_some_and(|why| why.contains(message))
    })
    .await;
}

fn is_healthy(public: &TransparencyLog, name: &str, size: u64) -> bool {
    public.status().witnesses.contains(&WitnessStatus { name: name.to_owned(), size, error: None })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cosignatures_are_in_checkpoints_and_proofs_after_restart() {
    let log = Log::new();
    let test_witness = TestWitness::new(NAME, &[log.signer.key()]);
    let (witness, _task) = test_witness.serve().await;
    let key = test_witness.key();
    let public = open(&log, &[&witness]).await;
    let mut size = 0;
    for next in [1, 5, 300] {
        let published = publish_all(&public, size..next).await;
        size = next;
        // The proof is available immediately, with or without cosignature.
        for (n, publication) in &published {
            assert_proven(&log, &public, *n, publication).await;
        }
        until_cosigned(&log, &public, size, &[&key]).await;
        assert!(is_healthy(&public, NAME, size));
        let proof = public.prove(size - 1).await.unwrap().unwrap();
        let bytes = public.record(size - 1).await.unwrap().unwrap().bytes;
        let proven = proof.verify(&bytes, log.signer.key()).unwrap();
        assert_eq!(proven.checkpoint.cosigners(&[&key]), [NAME]);
    }
    // One submission per batch; concurrent publications may need several.
    let batches = test_witness.answers();
    assert!(
        batches.len() >= 3 && batches.iter().all(|status| *status == 200),
        "the log remembers the size: {batches:?}"
    );
    assert_eq!(test_witness.seen().0, 300);
    drop(public);
    // A restarted log submits the same tree, and later a larger one, without knowing the size that the witness has cosigned.
    let public = open(&log, &[&witness]).await;
    until_cosigned(&log, &public, 300, &[&key]).await;
    assert_eq!(test_witness.answers()[batches.len()..], [409, 200]);
    drop(public);
    let unwatched = log.open().await;
    publish_all(&unwatched, 300..310).await;
    drop(unwatched);
    let public = open(&log, &[&witness]).await;
    until_cosigned(&log, &public, 310, &[&key]).await;
    assert_eq!(test_witness.answers()[batches.len() + 2..], [409, 200]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failing_witness_is_reported_and_delays_nothing() {
    let log = Log::new();
    let test_witness = TestWitness::new(NAME, &[log.signer.key()]);
    let (witness, task) = test_witness.serve().await;
    let public = open(&log, &[&witness]).await;
    let behaviours = [
        (Behaviour::Garbage, "cosignature does not verify"),
        (Behaviour::WrongSignature, "cosignature does not verify"),
        (Behaviour::Broken, "status 500"),
        (Behaviour::NoSize, "status 409 without a tree size"),
        (Behaviour::Silent, "timeout"),
    ];
    for (n, (behaviour, message)) in (0..).zip(behaviours) {
        test_witness.set(behaviour);
        let published = publish_all(&public, [n]).await;
        assert_published(&log, &public, &published).await;
        until_reported(&public, NAME, message).await;
        until_cosigned(&log, &public, n + 1, &[]).await;
    }
    test_witness.set(Behaviour::Honest);
    publish_all(&public, 5..6).await;
    until_cosigned(&log, &public, 6, &[&test_witness.key()]).await;
    assert!(is_healthy(&public, NAME, 6));
    task.abort();
    let _ = task.await;
    let published = publish_all(&public, 6..7).await;
    eventually("witness error reported", async || public.status().witnesses[0].error.is_some()).await;
    assert_published(&log, &public, &published).await;
    until_cosigned(&log, &public, 7, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn available_witness_cosigns_if_the_other_is_unavailable() {
    let log = Log::new();
    let (reachable, unreachable) =
        (TestWitness::new(NAME, &[log.signer.key()]), TestWitness::new("witness.example/w2", &[log.signer.key()]));
    let ((one, _task), (two, task)) = (reachable.serve().await, unreachable.serve().await);
    let public = open(&log, &[&two, &one]).await;
    publish_all(&public, 0..3).await;
    until_cosigned(&log, &public, 3, &[&reachable.key(), &unreachable.key()]).await;
    task.abort();
    let _ = task.await;
    publish_all(&public, 3..5).await;
    until_cosigned(&log, &public, 5, &[&reachable.key()]).await;
    assert!(is_healthy(&public, NAME, 5));
    let status = public.status().witnesses.into_iter().find(|status| status.name == "witness.example/w2").unwrap();
    assert!(status.error.is_some() && status.size == 3, "{status:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn witness_of_forked_log_rejects_and_is_reported() {
    // Two logs with the same key and name: the attack that witnesses detect.
    let one = Log::new();
    let test_witness = TestWitness::new(NAME, &[one.signer.key()]);
    let (witness, _task) = test_witness.serve().await;
    let public = open(&one, &[&witness]).await;
    publish_all(&public, 0..5).await;
    until_cosigned(&one, &public, 5, &[&test_witness.key()]).await;
    drop(public);
    for (size, message) in [
        (3, "witness has cosigned a tree of 5 entries"),
        (7, "witness found the checkpoint inconsistent with an earlier one (422)"),
        (5, "status 409 without a tree size"),
    ] {
        let other = Log { signer: one.signer.clone(), ..Log::new() };
        let public = open(&other, &[&witness]).await;
        let published = publish_all(&public, 100..100 + size).await;
        until_reported(&public, NAME, message).await;
        until_cosigned(&other, &public, size, &[]).await;
        assert_published(&other, &public, &published).await;
    }
    assert_eq!(test_witness.seen().0, 5, "the witness has cosigned another tree");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn witness_without_log_or_key_is_reported() {
    let log = Log::new();
    let (same_name, foreign) = (LocalSigner::new(ORIGIN), LocalSigner::new("log.example/other"));
    let (wrong_key, no_log) =
        (TestWitness::new(NAME, &[same_name.key()]), TestWitness::new("witness.example/w2", &[foreign.key()]));
    let ((one, _one), (two, _two)) = (wrong_key.serve().await, no_log.serve().await);
    let public = open(&log, &[&one, &two]).await;
    publish_all(&public, 0..2).await;
    until_reported(&public, NAME, "witness rejects the log's signature (403)").await;
    until_reported(&public, "witness.example/w2", "log unknown to the witness (404)").await;
    until_cosigned(&log, &public, 2, &[]).await;
}
