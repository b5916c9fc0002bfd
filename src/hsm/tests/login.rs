//! A wrong PIN is tried only once.

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::session::UserType;
use cryptoki::types::AuthPin;

use super::{USER_PIN, in_module};
use crate::hsm::{Ceremony, HsmError};

#[test]
fn wrong_pin_stops_hsm_without_locking_token() {
    in_module(|token| {
        let wrong = token.pin_file("wrong.pin", "000000");
        let Err(HsmError::Stopped(why)) = Ceremony::open(&token.profile, &token.identity(), &wrong) else {
            panic!("expected HsmError::Stopped");
        };
        assert!(why.contains("CKR_PIN_INCORRECT") && why.contains("no further attempt is made"), "{why}");
        assert!(!why.contains("000000"), "{why}");

        let module = Pkcs11::new(&token.profile.library).unwrap();
        // If the library was not unloaded, the module is still initialised.
        let _ = module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK));
        let slot = module.get_slots_with_initialized_token().unwrap()[0];
        let token_info = module.get_token_info(slot).unwrap();
        assert!(token_info.user_pin_count_low(), "the token did not count the attempt");
        assert!(!token_info.user_pin_final_try() && !token_info.user_pin_locked());
        let session = module.open_rw_session(slot).unwrap();
        session.login(UserType::User, Some(&AuthPin::new(USER_PIN.into()))).unwrap();
    });
}

#[test]
fn token_with_other_serial_is_refused() {
    in_module(|token| {
        let mut other = token.identity();
        other.serial = "0000000000000000".to_owned();
        let Err(error) = Ceremony::open(&token.profile, &other, &token.pin()) else { panic!("the token was opened") };
        let why = error.to_string();
        assert!(why.contains("no token named spp-test (serial 0000000000000000); the module has: spp-test ("), "{why}");
    });
}
