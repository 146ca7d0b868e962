//! Every error code of the project: what it means and what to do, in one table.
//!
//! `AS01xx` attribute and syntax, `AS02xx` analysis, `AS03xx` mesh, scope and sites at run time, `AS04xx` collectives and
//! faults, `AS05xx` training, data and files, `AS06xx` command line. A code is never reused.

/// One error code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Code {
    /// The code as it is printed, such as `AS0203`.
    pub id: &'static str,
    /// One line: what is wrong.
    pub title: &'static str,
    /// Why it is refused and what to do, as `cargo autosp explain` prints it.
    pub explanation: &'static str,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $id:literal, $title:literal, $explanation:literal;)*) => {
        $(
            #[doc = concat!("`", $id, "`: ", $title, ".")]
            $(#[$doc])*
            pub const $name: Code = Code { id: $id, title: $title, explanation: $explanation };
        )*
        /// All codes, in order.
        pub const ALL: &[Code] = &[$($name),*];
    };
}

codes! {
    UNKNOWN_ARGUMENT = "AS0101", "unknown attribute argument",
        "The attribute takes the arguments listed in the message. Anything else is refused, since a misspelt setting would otherwise be ignored.";
    FILE_MODULE = "AS0102", "a module in a file of its own",
        "On stable Rust an attribute on `mod x;` does not see the file. Write `mod x { include!(\"x.rs\"); }`: the attribute reads the file, which stays as it is.";
    ITEM = "AS0103", "the attribute is on something it cannot analyse",
        "The attribute analyses an inline module: the types, their fields and the functions that the decisions need have to be inside it.";
    INCLUDE = "AS0104", "an included file cannot be read",
        "`include!(\"model.rs\")` inside the annotated module is read by the attribute. The path is relative to the file that holds the attribute.";
    PARSE = "AS0105", "the source is not Rust",
        "The file that the annotated module includes does not parse. The message has the line and column.";
    ASSERTION = "AS0106", "something is said that cannot be so",
        "`tokenwise`, `replicated` and `sharded` say what the analysis cannot see of a function or field, as an attribute on it, a list in the attribute of the module, or a list in `[build]` of the settings file. What is said of nothing, wrongly, twice or without need is reported, since it would otherwise hide a mistake.";
    NESTING = "AS0107", "a source that nests too deeply",
        "Brackets, chains of calls and branches inside one another are followed to a depth that code written by people stays far below; beyond it the compiler would run out of stack. Usually a macro or a generator wrote it.";

    NO_ATTENTION = "AS0201", "no attention found",
        "An attention is a product of queries and keys, a softmax over the keys and a product with the values, over the same sequence. A module without one has nothing that could be trained in parallel, and running it unsharded in silence would be worse than an error.";
    UNKNOWN_CALL = "AS0202", "an unknown call on a sharded value",
        "Each rank holds a part of the tokens. A function that is neither in the annotated module nor in the operation table could mix tokens, so it is refused where its result matters.";
    MIXES_TOKENS = "AS0203", "an operation mixes tokens of different ranks",
        "Outside attention every token must be computed by itself: sums, orders, picks and reshapes along the sequence need tokens that other ranks hold.";
    SOFTMAX_AXIS = "AS0204", "a softmax over another axis than the keys",
        "Attention normalises each query's scores over the keys, the last dimension of `q k^T`. Over another axis it means something else, which is not sharded.";
    SIZE_USE = "AS0205", "a size that cannot be classified",
        "A rank sees the length of its shard where the program on one device sees the length of the sequence. Reshapes take the first; comparisons, ranges, floats and host data take the second. A use that is neither known as the one nor as the other is refused.";
    NOT_FOLLOWED = "AS0206", "a value that cannot be followed",
        "The analysis follows tensors through the module's own functions, branches, loops, options and tuples. Here it lost one that a decision depends on; the message says why.";
    SHAPES = "AS0207", "shapes that do not fit",
        "The operands' shapes, as followed from the input, contradict each other. Most often a transpose is missing.";
    MASK = "AS0208", "a mask that cannot be followed",
        "A mask of all tokens against all is never made on a rank, so it has to come from a rule over (query, key) in the module.";
    SCORES_USED = "AS0209", "attention scores used for something else",
        "Scores and weights of all tokens against all are never made on a rank. Between the two products only scaling, soft caps, masks, casts and the softmax can stand.";
    CROSS_ATTENTION = "AS0210", "attention between different sequences",
        "Only self-attention is sharded: queries and keys must range over the same tokens.";
    RANDOM = "AS0211", "random numbers on a shard",
        "Dropout and other random operations draw different numbers on each rank than one device would, so that the result could not be exact.";
    HOST_READ = "AS0212", "a sharded tensor is read to the host",
        "The host would see this rank's tokens only, and decide differently on each rank.";
    LAYOUT = "AS0213", "operands of an attention in an unknown layout",
        "The exchange moves heads one way and tokens the other, so batch, heads, sequence and width must be told apart in queries, keys and values.";
    TWO_WAYS = "AS0214", "one function with two meanings",
        "A function is called with tensors and with attention scores in a way that one signature cannot express.";
    VERIFY = "AS0215", "a plan that does not hold",
        "The verifier found that an operand does not have the placement that its operation requires. This is a fault of the compiler; please report it with the model.";
    LOSS = "AS0216", "no loss over all tokens",
        "With the argument `loss` a function that keeps one token is followed for every token: all tokens become rows of the batch, and what comes after the pick runs as it stands. Here it counts or mixes rows.";
    LEARNED_BIAS = "AS0217", "a learned bias on the scores",
        "A site gives gradients to queries, keys and values. A bias on the scores that comes out of a layer would need a fourth one, from all tokens against all, and is refused rather than trained without it.";
    CONVOLUTION = "AS0218", "a convolution along the sequence",
        "A convolution or a pooling window at the end of a shard needs tokens that the next rank holds, which is not done. Sharded models compute every token by itself outside of attention.";
    SCAN = "AS0219", "a recurrence along the sequence",
        "A loop over the tokens, or a recurrent layer, makes each token wait for the one before it, so that ranks could only run one after another.";
    NO_SOFTMAX = "AS0220", "attention without a softmax over the keys",
        "What is sharded is `softmax(q k^T) v`: its scores are never made whole. Linear, rectified or other attention pairs all tokens in another way.";
    RETURNS_SHARD = "AS0221", "a public function returns a shard without saying so",
        "The result holds the tokens of one rank, merged with the rows into one dimension, so that a caller cannot tell that tokens are missing. Keep the sequence a dimension of its own, or say that callers know.";

    MESH = "AS0301", "the mesh does not fit",
        "A run has dp x sp ranks. Every rank count is at least 1, and a model's heads must divide among the sp ranks of a group, or each kv head must be held by the same number of ranks.";
    NESTED_RUN = "AS0302", "a run inside a run",
        "`autosp::run` was called by a rank of another run. One run has all ranks that there are; give it the mesh you need and call what the inner closure called directly.";
    LOCAL_LENGTH = "AS0303", "the length on this rank is not what was sharded",
        "Inside a sharded scope each rank holds one shard of the sequence, as `sp.shard` cut it. The tensor that entered the model has another length: it was not sharded, was sharded for another batch, or was cut or padded on the way.";
    CACHE_OFFSET = "AS0304", "a position offset inside a sharded scope",
        "Training runs over whole sequences from position 0; a key-value cache that starts elsewhere has no meaning there. Generate outside the scope: the original function runs unchanged.";
    NO_SCOPE = "AS0305", "a sharded scope is needed",
        "This works only inside `trainer.step`, `trainer.evaluate` or `sp.scope(|| ..)`, after a sharded tensor has entered the model.";
    RANKS_DISAGREE = "AS0306", "ranks of one group disagree",
        "The ranks of an sp group share one sequence, so each must cut the same batch: same tokens, same length. Usually every rank reads its own data; read by `dp_rank`, not by `rank`.";
    AMBIGUOUS_SHARD = "AS0307", "more than one shard has this length",
        "Two batches of different valid lengths have the same length on a rank, and the tensor that entered the model is neither of the ones `sp.shard` returned. A guess could mask the wrong tokens.";
    UNKNOWN_SETTING = "AS0308", "unknown setting",
        "Only the listed settings exist. A misspelt one is refused, since it would otherwise be ignored.";
    SETTING_VALUE = "AS0309", "a setting has a value that it does not take",
        "Each setting has a type and a range; the message says where the value was read.";
    SETTINGS_FILE = "AS0310", "a settings file cannot be read",
        "A settings file is TOML: lines of `name = value`, strings in quotes, `#` for comments.";
    CANDLE = "AS0311", "an operation of candle failed",
        "The message is candle's own: an operation got shapes, types or devices that it does not take. Set RUST_BACKTRACE=1 to see where.";
    SETTINGS_CONTRADICT = "AS0312", "settings contradict each other",
        "Two sources of the same strength, such as two files or `AUTOSP_SP` and `AUTOSP_sp`, say different things, or one setting rules out another. Which of them was meant cannot be known. The message says where each was read.";
    INPUT_RANK = "AS0313", "an input has another number of dimensions than the model was analysed with",
        "The model never reads how many dimensions this input has, and its uses were taken to say it. Read its sizes in the model, as in `let (b, s) = mask.dims2()?`, so that both are known.";
    LAUNCH_VARIABLES = "AS0314", "the variables of a launcher cannot be used",
        "A launcher says by variables which rank a process is: RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE by torchrun and `cargo autosp launch`, SLURM_PROCID and others by srun, OMPI_COMM_WORLD_RANK and others by mpirun. A set that is incomplete, or two sets that say different things, leave the rank unknown, and a guess would end in ranks that wait for each other. Unset those that are left over from something else.";

    SITE_HEADS = "AS0321", "heads and ranks do not fit",
        "Each sp rank attends query_heads / sp heads, so sp divides the query heads; and kv heads are either divided among ranks or each is held by the same number of ranks, so sp divides the kv heads or the kv heads divide sp. The message lists the values of sp that fit this model.";
    SITE_LAYOUT = "AS0322", "a layout that the exchange cannot follow",
        "A site's tensors have the axes batch, heads, sequence and width, one dim each, in any order. Merged axes such as (b h) s d have to be split before the site.";
    SITE_SHAPE = "AS0323", "shapes do not fit the attention site",
        "q, k and v of a site have the same batch and sequence, q and k the same width, k and v the same heads, and the sequence is this rank's shard. The message says which size was expected.";
    SCORES = "AS0324", "the scores are changed in a way that has no exact form",
        "Between q k^T and softmax a site follows: factors, one soft cap (divide, tanh, multiply), then masks that fill or are added, and casts. In another order the result could not be computed without the S x S scores.";
    SITE_MASK = "AS0325", "a mask that the site cannot apply",
        "A mask is [S, S] over (query, key) of the whole sequence, with leading dims of size 1 or of the scores: integers where it selects, floats where it is added.";
    BAND_DIFFERS = "AS0326", "a mask is not the band it was taken for",
        "The compiler recognised a causal or windowed mask in the builder, and at run time the builder makes other values. Nothing is computed with a wrong mask.";
    DENSE_MASK = "AS0327", "a dense mask is too large",
        "A mask that is a tensor is held whole by every rank, which a long sequence does not allow. A mask that is computed on the host from (query, key) has no size.";
    SCHEDULE = "AS0328", "a schedule is not correct",
        "Each group is sent, waited for, attended once and sent back, in that order, and everything sent is waited for. The message names the verb that is missing or comes too early.";
    KERNEL = "AS0329", "attention cannot take these tensors",
        "Attention on the CPU takes f32, f64, bf16 and f16, one type for q, k and v.";
    FILL = "AS0330", "a fill is not one number",
        "where_cond at a site takes scores on one side and one number on the other: a scalar tensor, or a scalar that was broadcast. A tensor of S x S different values would be the dense scores again.";
    HELPER = "AS0331", "a helper is not what it was taken for",
        "A layer or function of another library was followed by what its name stands for, such as `repeat_kv` or a linear layer. At its first use it is held against that; this one does something else, or has no backward.";
    UNTAKEN = "AS0332", "a branch that is not sharded is taken",
        "Some branches of a model cannot be sharded, such as a call of a flash attention library, and are decided by the model's configuration. The other branches are sharded; this one is an error when a run takes it.";
    SEQUENCE_GRADIENT = "AS0333", "a running sum along the sequence that would need a gradient",
        "Running sums over sharded tokens are computed for masks and counts, which are constants. A tensor that depends on variables would lose its gradient there.";

    REPLAY = "AS0351", "a block that is computed again takes another way",
        "The forward of a block that is computed again in the backward has to run the same attention sites in the same order as the first time. A block that decides by something that changes between the two, such as a counter or a random number, cannot be in a checkpoint scope; use policy `all`.";
    POLICIES = "AS0352", "policies for another number of blocks",
        "The setting `policy` says what each block keeps, in the order in which the blocks of a forward run. Where the last word has a number of blocks too, the model has to have as many; without a number it is for all blocks that are left.";
    HOST_MEMORY = "AS0353", "the host has no room for what blocks keep",
        "With `+offload` in `policy`, what a block keeps goes to memory of the host, of which a rank takes no more than the setting `host_memory` says. The message says how much was needed by then; all blocks of a step need it at once.";
    DROPOUT = "AS0334", "a dropout that cannot be drawn",
        "The probability of a dropout is at least 0 and below 1.";

    RANK_FAILED = "AS0401", "a rank failed",
        "The code of one rank panicked. The other ranks were stopped, since they would have waited for it. The message names the rank that failed first.";
    MISMATCH = "AS0402", "ranks run different collectives",
        "All ranks of a group must start the same collectives in the same order with the same shapes. A branch that depends on the rank or on its data usually makes them differ.";
    DEADLINE = "AS0403", "a rank did not arrive in time",
        "A collective waited longer than the setting `deadline`. The message names the ranks that did not arrive and what each rank did last. Either a rank is stuck, or the deadline is too short for the work between two collectives.";
    STOPPED = "AS0404", "stopped because another rank failed",
        "This rank was healthy; it stopped because it would have waited for a rank that failed.";
    RANK_RETURNED = "AS0405", "a rank returned while others wait for it",
        "A rank left the closure of the run without starting a collective that the others are in. Every rank must run the same number of steps: batches are counted per group, not per rank.";
    COLLECTIVE_ARGUMENT = "AS0406", "a collective got arguments that it does not take",
        "The number of parts is the size of the group, and shapes and types agree over its ranks.";
    UNFINISHED = "AS0407", "a collective was never waited for",
        "A rank started a collective and returned without waiting for it. What the others sent was lost; on a GPU the stream would hang.";
    RENDEZVOUS = "AS0408", "the ranks of a launched program did not find each other",
        "Each process connects to rank 0 before anything runs, and proves that it knows the secret of the run (AUTOSP_SECRET). A rank was missing when the setting `start_deadline` had passed, the place of rank 0 cannot be reached or is in use, or there is no secret. The message names the ranks or the address.";
    RANKS_DIFFER = "AS0409", "the ranks of a launched program differ",
        "All ranks of a run are the same program with the same settings, and together as many as dp x sp. A rank with another build would take another way through the program, and one with other settings would compute something else. The message says what differs, and on which rank.";
    CUDA_LIBRARY = "AS0410", "no GPU can be used",
        "The program was built without the feature `cuda`, or a library of NVIDIA is older than what it was built for. The message says what was found and the help line what to install.";
    CUDA = "AS0411", "a library of NVIDIA refused",
        "CUDA, cuDNN or NCCL returned an error. The message names the operation, the rank and the bytes where there are any, and what the library said. Attention that cuDNN has no kernel for ends here too: its message lists heads, widths, length and band.";
    RANK_LOST = "AS0412", "the process of a rank is gone",
        "Ranks that are processes tell each other regularly that they are alive. One of them ended without a word, as a process does that is killed or runs out of memory, or said nothing for the time of the setting `deadline`, as one does that is stopped or whose host is gone. Its own output says more, and the kernel's log if it was killed for memory.";

    FILE_UNREADABLE = "AS0501", "a model or data file cannot be read",
        "The path does not exist, is a folder where a file is needed, or may not be read. The message says which.";
    FILE_BROKEN = "AS0502", "a model file is not a safetensors file",
        "The file was cut short or is in another format. Models are read and written as safetensors.";
    TENSOR_MISSING = "AS0503", "a model file lacks a tensor",
        "The model asks for a tensor that none of the files holds. The file belongs to another model, a file of a set is missing, or the names have another prefix.";
    TENSOR_SHAPE = "AS0504", "a tensor has another shape than the model expects",
        "The model's configuration does not fit the file, or two parts of a model ask for one name with different shapes.";
    FILE_UNWRITABLE = "AS0505", "a file cannot be written",
        "The folder does not exist, may not be written, or the disk is full. What was there before is unchanged.";
    NO_TEXT = "AS0506", "no text to train on",
        "The paths hold no file that is valid UTF-8 text with at least one byte. Folders are searched for files; binary files, hidden folders and `target` are passed over.";
    TEXT_SHORT = "AS0507", "the sequence is longer than the text",
        "A sequence of S tokens is cut out of one piece of text, which has to be at least that long. Give more text or a smaller S.";
    BATCH_SPLIT = "AS0508", "the batch does not divide by dp",
        "A batch is global: its rows are shared out to the dp replicas, each of which takes the same number.";
    BATCH_SHAPE = "AS0509", "a batch has a shape or type that cannot be sharded",
        "Tokens are whole numbers of shape [batch, sequence]; labels have the shape of the tokens.";
    NO_TARGET = "AS0510", "no valid target anywhere",
        "Every label of the batch, on all ranks, is -100, so that the mean has nothing to average. Check the masking of the labels.";
    LABEL_RANGE = "AS0511", "a label is not a class",
        "A label is a class below the last dimension of the logits, or -100 to be ignored.";
    NO_GRADIENT = "AS0512", "a variable gets no gradient on any rank",
        "The loss does not depend on the variable, or an operation on the way has no backward, which candle does not report by itself. Freeze the variable if that is meant.";
    NOT_FINITE = "AS0513", "the loss or a gradient is not finite",
        "The step was not taken, and the parameters are what they were before it. Lower the learning rate, clip the gradients, or set `skip_non_finite` to pass over such batches.";
    TABLE_SHORT = "AS0514", "a table of positions is shorter than the sequence",
        "A table that holds one row a position (rope, learned positions, ALiBi) needs at least S rows, padding not counted. Build it for a longer context.";
    POSITION = "AS0515", "a position is not in the sequence",
        "The token that is picked has to be one of the S tokens of the sequence.";
    TRAIN_SETTING = "AS0516", "a training setting has a value that it does not take",
        "The message names the setting, what it takes and what was found.";
    NOT_EQUIVALENT = "AS0517", "sharded training differs from one rank",
        "The loss or a gradient differs by more than the contract allows: per tensor |a - b| <= 1e-5 |b| + 1e-7 x global gradient norm. The message names the tensor and the place of the largest difference.";

    UNCOLLECTED = "AS0518", "gradients of blocks were left behind",
        "The gradients of variables inside a model's blocks do not pass through candle's gradient store. After each backward of an own loop `sp.reduce_gradients` collects them; without it an optimizer would leave these variables as they are. `trainer.step` does all of this.";

    TENSOR_EXTRA = "AS0540", "a model file holds tensors that the model does not use",
        "The model was built without asking for a tensor of its files: it has fewer layers, another head, or other names. Trained and saved it would be another model. `Parameters::ignore` passes over tensors that are left out on purpose.";
    TENSOR_TWICE = "AS0541", "two model files hold the same tensor",
        "The files of one model hold each tensor once. Files of two models were mixed, or a file was named twice.";
    TENSOR_DTYPE = "AS0542", "a tensor has a type that cannot be trained",
        "Parameters are F64, F32, BF16 or F16. Whole numbers have no gradient, and eight-bit floats need scales that belong to them: convert such a model first.";
    INDEX = "AS0543", "an index of model files does not fit",
        "`model.safetensors.index.json` names the file of each tensor. It is broken, names a file or tensor that is not there, or lies beside files of another model: download the folder again.";
    CONFIG = "AS0544", "a config.json that cannot be used",
        "The file is not JSON, lacks a field, holds a value of the wrong kind, or says two things that cannot both be. The message names the field, or line and column.";
    TOKENIZER = "AS0545", "a tokenizer cannot be used",
        "The file is not a tokenizer.json as the crate `tokenizers` reads it, lacks a token that was named, or cannot encode or decode.";
    DATA_LINE = "AS0546", "a line of a data file cannot be used",
        "Each line of a JSON lines file is an object that holds a string in the named field. The message says file, line and what was found.";
    DOCUMENT_SHORT = "AS0547", "a document is shorter than the sequence",
        "A row of tokens alone cannot say where a short document ends. `labelled_batch` fills such rows with padding that is ignored, `packed_batch` says which token belongs to which document, and `Packing::Cross` lets attention run across documents.";
    TOKEN_FILE = "AS0548", "a file of tokens cannot be used",
        "A token file is a sequence of little-endian numbers of 2 or 4 bytes and nothing else. Its length is a multiple of that, and no token is beyond the vocabulary.";
    CHECKPOINT = "AS0561", "a checkpoint is of another model or optimizer",
        "A run goes on with the variables and the optimizer that wrote the checkpoint; mesh, ZeRO stage, policy, learning rate and data may change. The message names what differs. To begin a new run with the same parameters, load `parameters.safetensors` of the checkpoint with `load_trainable`.";

    OUT_OF_MEMORY = "AS0562", "a rank has no memory left on its device",
        "The device is full, or more was held than `memory_limit` allows. The message says what the memory was wanted for, what else is held there, and which setting makes it less. The step was not taken: unless the message is of the update, parameters and optimizer are what they were before it and can be saved; a checkpoint on disk is what it was. `cargo autosp estimate` says beforehand what fits.";

    RATES = "AS0611", "a file of measured rates that cannot be used",
        "`cargo autosp estimate --rates FILE` reads rates in FLOP/s and bytes/s, as numbers above 0 under the names that `doctor` writes. Leave the file out to plan with the rates of an H200.";
    UNREADABLE_FILE = "AS0601", "a file named on the command line cannot be read",
        "The path does not exist, is a folder, is not UTF-8 text, or may not be read. The message says which. `plan` and `expand` take one Rust source file.";
    UNPARSABLE_FILE = "AS0602", "a file named on the command line is not Rust",
        "The file could not be parsed as Rust source, at the line and column that the message names. `rustc` or `cargo check` says more about it.";
    UNKNOWN_CODE = "AS0603", "unknown error code",
        "`explain` takes a code as messages print it in square brackets, such as AS0101, in any case. Without an argument it lists all codes.";
    ARGUMENT = "AS0604", "a program was given an argument that it cannot use",
        "A flag does not exist, has a value of the wrong kind, or asks for something that makes no sense, as the message says. `--help` lists the flags of a program and what they take.";
    DEPENDENCY = "AS0605", "a dependency or one of its modules cannot be found",
        "`adopt` and `survey` look for a package among the dependencies that cargo knows, and for a module among its source files. The message says which of the two is missing, or in cargo's words why it cannot say.";
    EXISTS = "AS0606", "a file would be written over",
        "The file is there already and may hold changes of yours. `--force` writes over it.";
    LAUNCH_FAILED = "AS0607", "a rank of a launched program failed",
        "`launch` starts one process a rank and stops all when the first ends with a failure or is stopped. The message names that rank, how it ended and what it wrote last; `launch` ends with its exit code, which is 128 plus the number of the signal for a process that was killed.";
    LAUNCH_PROGRAM = "AS0608", "a program cannot be launched",
        "The program that `launch` was given does not exist, may not be run, or the system has no room for another process. Give its path, as in `./target/release/train`.";
}

/// Looks a code up by its printed form, in any case.
pub fn find(id: &str) -> Option<&'static Code> {
    ALL.iter().find(|code| code.id.eq_ignore_ascii_case(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_well_formed() {
        for (i, code) in ALL.iter().enumerate() {
            let digits = code.id.strip_prefix("AS0").expect("codes begin with AS0");
            assert!(
                digits.len() == 3 && digits.bytes().all(|b| b.is_ascii_digit()),
                "{}",
                code.id
            );
            assert!(
                ALL[..i].iter().all(|other| other.id != code.id),
                "{} twice",
                code.id
            );
            assert!(
                !code.title.ends_with('.') && code.explanation.ends_with('.'),
                "{}",
                code.id
            );
            assert_eq!(find(&code.id.to_lowercase()), Some(code));
        }
    }
}
