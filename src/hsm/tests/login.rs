//! A wrong PIN is tried once.

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::session::UserType;
use cryptoki::types::AuthPin;

use super::{USER_PIN, in_module};
use crate::hsm::{Ceremony, HsmError};

#[test]
fn a_wrong_pin_needs_an_officer_and_does_not_lock_the_token() {
    in_module(|place| {
        let wrong = place.pin_file("wrong.pin", "000000");
        let Err(HsmError::Stopped(why)) = Ceremony::open(&place.profile, &place.token(), &wrong) else {
            panic!("the wrong PIN was not told");
        };
        assert!(why.contains("CKR_PIN_INCORRECT") && why.contains("it is not tried again"), "{why}");
        assert!(!why.contains("000000"), "{why}");

        let module = Pkcs11::new(&place.profile.library).unwrap();
        // The module stays initialised from the first time where its library was not unloaded.
        let _ = module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK));
        let slot = module.get_slots_with_initialized_token().unwrap()[0];
        let token = module.get_token_info(slot).unwrap();
        assert!(token.user_pin_count_low(), "the token counted the attempt");
        assert!(!token.user_pin_final_try() && !token.user_pin_locked());
        let session = module.open_rw_session(slot).unwrap();
        session.login(UserType::User, Some(&AuthPin::new(USER_PIN.into()))).unwrap();
    });
}

#[test]
fn a_token_of_another_name_is_not_taken() {
    in_module(|place| {
        let mut other = place.token();
        other.serial = "0000000000000000".to_owned();
        let Err(error) = Ceremony::open(&place.profile, &other, &place.pin()) else { panic!("it was opened") };
        let why = error.to_string();
        assert!(why.contains("no token named spp-test (serial 0000000000000000); the module has: spp-test ("), "{why}");
    });
}
