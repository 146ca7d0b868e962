use std::time::Duration;

use super::*;

fn flag(name: &str) -> Source {
    Source::Flag(format!("--{name}"))
}

fn variable(name: &str, value: &str) -> [(String, String); 1] {
    [(name.to_owned(), value.to_owned())]
}

#[test]
fn every_row_is_sound_and_every_accessor_names_one() {
    let settings = Settings::default();
    for (key, value, source) in settings.entries() {
        assert!(value.in_range(), "{}", key.name);
        assert_eq!(source, &Source::Default);
        let text = match value {
            Value::Choice(word) => word.to_owned(),
            ref other => other.to_string().trim_matches('"').to_owned(),
        };
        assert_eq!(
            key.parse(&text),
            Ok(value),
            "the default of {} does not read back",
            key.name
        );
    }
    assert_eq!((settings.sp(), settings.dp(), settings.groups()), (1, 1, 2));
    assert_eq!(settings.deadline().as_secs(), 120);
    assert_eq!(
        (settings.attention(), settings.policies().single()),
        (Attention::Tiled, Some(Keep::on_device(Policy::All)))
    );
    assert_eq!(settings.zero(), Zero::Stage0);
    assert_eq!(settings.device(), Device::Cpu);
    assert_eq!(
        (
            settings.memory(),
            settings.memory_limit(),
            settings.optimizer()
        ),
        (Memory::Auto, None, Place::Device)
    );
}

#[test]
fn what_is_chosen_gives_way_to_whatever_is_said() {
    let mut settings = Settings::default().with_groups(3);
    settings.choose("groups", Value::Count(8));
    settings.choose("tile", Value::Count(64));
    settings.choose("tile", Value::Count(128));
    assert_eq!((settings.groups(), settings.tile()), (3, 128));
    assert!(settings.is_said("groups") && !settings.is_said("tile"));
    assert_eq!(settings.source("tile").unwrap().to_string(), "the planner");
    assert_eq!(settings.with_tile(5).tile(), 5);
}

#[test]
fn typed_setters_reach_their_row() {
    let settings = Settings::default()
        .with_sp(4)
        .with_dp(2)
        .with_groups(3)
        .with_deadline(Duration::from_millis(1500))
        .with_start_deadline(Duration::from_secs(9))
        .with_attention(Attention::Reference)
        .with_policy(Policy::Input)
        .with_device(Device::CudaShared)
        .with_tile(512)
        .with_loss_bytes(4096)
        .with_host_memory(3 << 30)
        .with_zero(Zero::Stage1)
        .with_memory(Memory::Fixed)
        .with_memory_limit(5 << 30)
        .with_optimizer(Place::Host);
    assert_eq!(
        (
            settings.memory(),
            settings.memory_limit(),
            settings.optimizer()
        ),
        (Memory::Fixed, Some(5 << 30), Place::Host)
    );
    assert_eq!((settings.tile(), settings.zero()), (512, Zero::Stage1));
    assert_eq!(settings.device(), Device::CudaShared);
    assert_eq!(
        Settings::default().with_device(Device::Cuda).device(),
        Device::Cuda
    );
    assert_eq!((settings.sp(), settings.dp(), settings.groups()), (4, 2, 3));
    assert_eq!(settings.deadline(), Duration::from_millis(1500));
    assert_eq!(
        (settings.loss_bytes(), settings.host_memory()),
        (4096, 3 << 30)
    );
    assert_eq!(
        (settings.attention(), settings.policies().single()),
        (Attention::Reference, Some(Keep::on_device(Policy::Input)))
    );
    assert!(
        settings
            .entries()
            .all(|(_, _, source)| source == &Source::Program)
    );
}

#[test]
fn the_strongest_source_wins_whatever_the_order() {
    let mut settings = Settings::default();
    settings.set("sp", "8", flag("sp")).unwrap();
    let settings = settings
        .with_variables(variable("AUTOSP_SP", "4"))
        .unwrap()
        .with_file("autosp.toml", "# mesh\nsp = 2\ndp = 3\n")
        .unwrap()
        .with_sp(1)
        .with_variables(variable("AUTOSP_DP", "5"))
        .unwrap();
    assert_eq!((settings.sp(), settings.dp()), (8, 5));
    assert_eq!(settings.source("sp"), Some(&flag("sp")));
    assert_eq!(
        settings.source("dp").unwrap().to_string(),
        "variable AUTOSP_DP"
    );
    assert_eq!(settings.source("groups"), Some(&Source::Default));
    assert_eq!(settings.source("nothing"), None);
}

#[test]
fn a_file_sets_every_type_and_remembers_lines() {
    let text = "sp = 0x4\nattention = \"reference\"\n\ndeadline = 2.5\n";
    let settings = Settings::default()
        .with_file("run/autosp.toml", text)
        .unwrap();
    assert_eq!(
        (settings.sp(), settings.attention()),
        (4, Attention::Reference)
    );
    assert_eq!(settings.deadline(), Duration::from_millis(2500));
    assert_eq!(
        settings.source("deadline").unwrap().to_string(),
        "run/autosp.toml:4"
    );
}

#[test]
fn an_unknown_name_lists_the_known_ones() {
    let error = Settings::default()
        .with_file("autosp.toml", "dp = 1\n gruops = 2\n")
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "unknown setting `gruops` (autosp.toml:2:2), expected one of `sp`, `dp`, `groups`, `deadline`, `start_deadline`, `attention`, `device`, `loss_bytes`, `policy`, `host_memory`, `tile`, `zero`, `memory`, `memory_limit`, `optimizer`\n  \
         help: did you mean `groups`? [AS0308]"
    );
    let far = Settings::default().with("colour", "red").unwrap_err();
    assert_eq!((far.code, far.help), (codes::UNKNOWN_SETTING, None));
    let error = Settings::default()
        .with_variables(variable("AUTOSP_POLCY", "all"))
        .unwrap_err();
    assert!(
        error.message.contains("variable AUTOSP_POLCY") && error.help.unwrap().contains("`policy`")
    );
}

#[test]
fn two_swapped_or_single_letters_do_not_suggest_nonsense() {
    assert_eq!(keys::nearest("x"), None);
    assert_eq!(keys::nearest("qq"), None);
    assert_eq!(keys::nearest("sp"), Some("sp"));
    assert_eq!(keys::nearest("atention"), Some("attention"));
}

#[test]
fn other_variables_are_left_alone() {
    let settings = Settings::default()
        .with_variables(variable("HOME", "/root"))
        .unwrap();
    assert_eq!(settings, Settings::default());
}

#[test]
fn a_value_of_the_wrong_type_or_range_is_refused_with_its_place() {
    let refused = |text: &str| {
        Settings::default()
            .with_file("autosp.toml", text)
            .unwrap_err()
    };
    let error = refused("\nsp = \"four\"");
    assert_eq!(
        error.to_string(),
        "setting `sp` (autosp.toml:2:1): expected a whole number of at least 1, found the string \"four\"\n  \
         help: the default is `sp = 1` [AS0309]"
    );
    for text in [
        "sp = 0",
        "sp = -2",
        "sp = 1.5",
        "sp = [1]",
        "sp = true",
        "deadline = 0",
        "deadline = inf",
        "deadline = nan",
        "deadline = \"1\"",
        "attention = \"cudnn\"",
        "attention = 1",
        "policy = { a = 1 }",
    ] {
        assert_eq!(refused(text).code, codes::SETTING_VALUE, "{text}");
    }
    let error = Settings::default()
        .with_variables(variable("AUTOSP_SP", "4 ranks"))
        .unwrap_err();
    assert!(
        error.message.contains("(variable AUTOSP_SP)")
            && error.message.ends_with("found `4 ranks`"),
        "{}",
        error.message
    );
}

#[test]
fn a_malformed_file_names_line_and_column() {
    let error = Settings::default()
        .with_file("autosp.toml", "sp = 4\ndp = = 2\n")
        .unwrap_err();
    assert_eq!(error.code, codes::SETTINGS_FILE);
    assert!(
        error.message.starts_with("autosp.toml:2:6: "),
        "{}",
        error.message
    );
    let missing = Settings::default()
        .with_path(Path::new("no/such/autosp.toml"))
        .unwrap_err();
    assert!(
        missing.code == codes::SETTINGS_FILE
            && missing.message.starts_with("no/such/autosp.toml: ")
    );
}

#[test]
fn the_reference_has_a_row_for_each_setting() {
    let text = reference();
    assert_eq!(text.lines().count(), KEYS.len() + 2);
    assert!(
        text.lines().all(|line| line.matches('|').count() == 7),
        "a cell holds a `|`:\n{text}"
    );
    assert!(text.contains("| `deadline` | `AUTOSP_DEADLINE` | a number of seconds above 0 | `120` | when ranks start |"));
}

#[test]
fn equally_strong_sources_that_disagree_are_refused() {
    let two = Settings::default()
        .with_file("a.toml", "sp = 2\ndp = 3\n")
        .unwrap()
        .with_file("b.toml", "\ndp = 3\nsp = 4\n")
        .unwrap_err();
    assert_eq!(
        two.to_string(),
        "setting `sp`: expected one value, found 2 (a.toml:1) and 4 (b.toml:3) [AS0312]"
    );
    let variables = [("AUTOSP_SP", "2"), ("AUTOSP_sp", "4")];
    for order in [[0, 1], [1, 0]] {
        let pairs = order.map(|i| (variables[i].0.to_owned(), variables[i].1.to_owned()));
        let error = Settings::default().with_variables(pairs).unwrap_err();
        assert_eq!(error.code, codes::SETTINGS_CONTRADICT);
        assert!(error.message.contains("AUTOSP_SP") && error.message.contains("AUTOSP_sp"));
    }
    let mut flags = Settings::default();
    flags.set("sp", "2", flag("sp")).unwrap();
    flags.set("sp", "2", flag("ranks")).unwrap();
    assert!(flags.set("sp", "3", flag("sp")).is_err());
    // A program may change its mind, and a stronger source never contradicts a weaker one.
    let program = Settings::default()
        .with_sp(2)
        .with_sp(3)
        .with("sp", "4")
        .unwrap();
    assert_eq!(
        program
            .with_variables(variable("AUTOSP_SP", "5"))
            .unwrap()
            .sp(),
        5
    );
}

#[test]
fn a_mesh_that_is_needed_overrides_flags() {
    let mut settings = Settings::default();
    settings.set("sp", "4", flag("sp")).unwrap();
    let alone = settings.on_mesh(1, 1);
    assert_eq!((alone.sp(), alone.dp()), (1, 1));
    assert_eq!(alone.source("sp"), Some(&Source::Program));
}

#[test]
fn the_variable_that_names_the_file_is_no_setting() {
    let settings = Settings::default()
        .with_variables(variable(FILE_VARIABLE, "run/autosp.toml"))
        .unwrap();
    assert_eq!(settings, Settings::default());
}

#[test]
fn the_table_says_where_each_value_came_from() {
    let mut settings = Settings::default()
        .with_file("autosp.toml", "groups = 3\n")
        .unwrap()
        .with_variables(variable("AUTOSP_POLICY", "input"))
        .unwrap()
        .with_dp(2);
    settings.set("sp", "4", flag("sp")).unwrap();
    let table = settings.table();
    for line in [
        "sp             = 4            flag --sp",
        "dp             = 2            the program",
        "groups         = 3            autosp.toml:1",
        "deadline       = 120          default",
        "policy         = \"input\"      variable AUTOSP_POLICY",
    ] {
        assert!(table.lines().any(|found| found == line), "{line}\n{table}");
    }
    assert_eq!(table.lines().count(), KEYS.len());
}
