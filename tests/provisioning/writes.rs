//! Every write of the way breaks once, in both ways; then the call is repeated, in the same process or in a new one.

use spp::provisioning::ProvisionError;
use spp::store::StateName;

use spp_testkit::point::breaking::{Break, Write};
use spp_testkit::point::device::{Kind, OnTheLine};
use spp_testkit::point::{House, Point};
use spp_testkit::random::scaled;

/// The writes of the way, in their order.
const WAY: [Write; 5] = [Write::Reserve, Write::Issue, Write::Publish, Write::NotePublished, Write::Erase];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_phone_is_whole_whichever_write_breaks() {
    whichever_write_breaks(Kind::Phone).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sensor_is_whole_whichever_write_breaks() {
    whichever_write_breaks(Kind::Sensor).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_is_whole_whichever_write_breaks() {
    whichever_write_breaks(Kind::Gateway).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_with_a_pooled_pair_is_whole_whichever_write_breaks() {
    whichever_write_breaks(Kind::Pooled).await;
}

async fn whichever_write_breaks(kind: Kind) {
    let house = House::new().await;
    let mut n = 0;
    let mut next = || {
        n += 1;
        OnTheLine::new(&house, kind, n)
    };
    undisturbed(&ready_point(&house).await, next()).await;
    for (nth, write) in WAY.into_iter().enumerate() {
        for how in [Break::Failed, Break::FailedButPersisted] {
            // Both in the full size, one or the other in turn in the short one.
            let in_turn = [Then::Repeat, Then::Restart][(nth + how as usize + kind as usize) % 2];
            for then in scaled(vec![in_turn], vec![Then::Repeat, Then::Restart]) {
                println!("{kind:?}: {write:?} {how:?}, then {then:?}");
                one_write_breaks(ready_point(&house).await, next(), (nth, write, how), then).await;
            }
        }
    }
}

async fn ready_point(house: &House) -> Point<'_> {
    let point = house.point();
    point.filled(4).await;
    point
}

/// What comes after the call that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Repeat,
    Restart,
}

async fn undisturbed(point: &Point<'_>, mut device: OnTheLine) {
    let answer = device.walk(point).await;
    assert_eq!(point.faults.take_written(), WAY);
    device.assert_complete(point, answer).await;
}

async fn one_write_breaks(mut point: Point<'_>, mut device: OnTheLine, broken: (usize, Write, Break), then: Then) {
    let (nth, write, how) = broken;
    point.faults.break_nth(nth, how);

    let in_assemble = matches!(write, Write::Reserve | Write::Issue);
    let error = match device.assemble(&point).await {
        Ok(_) if !in_assemble => device.complete(&point).await.unwrap_err(),
        assembled => assembled.map(drop).unwrap_err(),
    };
    assert!(matches!(error, ProvisionError::Store(_)), "{error}");
    assert_eq!(left_by(&point, &device).await, left_by_break(write, how));
    device.assert_key_is_kept_until_the_end(&point).await;

    if then == Then::Restart {
        let tidied = point.restart().await;
        assert_eq!(tidied.failed, 0);
        assert_eq!(left_by(&point, &device).await, left_by_restart(write, how));
        device.assert_key_is_kept_until_the_end(&point).await;
    }
    // A station whose device is not complete may ask for the package again. It is the one that it had.
    let (state, public) = left_by(&point, &device).await;
    if in_assemble || (state == Some(StateName::Issued) && !public) {
        device.assemble(&point).await.unwrap();
    }
    let answer = device.complete(&point).await.unwrap();
    device.assert_complete(&point, answer).await;
    assert_eq!(device.complete(&point).await.unwrap(), answer, "a repeat gives the same receipt");
    device.assert_complete(&point, answer).await;
}

/// What the journal says of the chip, and whether its record is public.
async fn left_by(point: &Point<'_>, device: &OnTheLine) -> (Option<StateName>, bool) {
    (device.state(point).await, device.is_public(point).await)
}

fn left_by_break(write: Write, how: Break) -> (Option<StateName>, bool) {
    let persisted = how == Break::FailedButPersisted;
    let (before, after) = match write {
        Write::Reserve => ((None, false), (Some(StateName::Reserved), false)),
        Write::Issue => ((Some(StateName::Reserved), false), (Some(StateName::Issued), false)),
        Write::Publish => ((Some(StateName::Issued), false), (Some(StateName::Issued), true)),
        Write::NotePublished => ((Some(StateName::Issued), true), (Some(StateName::Published), true)),
        Write::Erase => ((Some(StateName::Published), true), (Some(StateName::Erased), true)),
        Write::Abort => unreachable!("not on the way"),
    };
    if persisted { after } else { before }
}

/// What is signed or published already is taken further without a station; what needs one waits for it.
fn left_by_restart(write: Write, how: Break) -> (Option<StateName>, bool) {
    match left_by_break(write, how) {
        (Some(StateName::Reserved), public) => (Some(StateName::Issued), public),
        (Some(_), true) => (Some(StateName::Erased), true),
        waits => waits,
    }
}
