//! Loops over the rows of a tensor on the host that put what they find about each row behind what they found before: the lists
//! that a router of experts makes. What such a loop does for some of the rows is what it does for all of them, restricted to
//! those, so that each rank can run it on its own rows.

use std::collections::HashSet;

use syn::visit::{self, Visit};

use super::text;

/// What a loop over rows appends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pushed {
    pub(crate) list: String,
    /// The loops, conditions and index round the push: lists with the same have their elements in the same order.
    pub(crate) signature: String,
    /// The element is the number of the row.
    pub(crate) index: bool,
}

/// Reads the body of `for PATTERN in rows` (`rows.enumerate()` where `counted`). `plain` says of an outer variable that it may be
/// read: a number or flag that is no tensor and comes from none.
///
/// # Errors
/// What stands in the way.
pub(crate) fn row_loop(
    f: &syn::ExprForLoop,
    counted: bool,
    plain: &dyn Fn(&str) -> bool,
) -> Result<Vec<Pushed>, String> {
    let mut body = Body {
        row: None,
        scopes: vec![HashSet::new()],
        heads: Vec::new(),
        head_names: HashSet::new(),
        written: HashSet::new(),
        pushes: Vec::new(),
        plain,
        problem: None,
    };
    match (&*f.pat, counted) {
        (syn::Pat::Tuple(t), true) if t.elems.len() == 2 => {
            if let syn::Pat::Ident(i) = &t.elems[0] {
                body.row = Some(i.ident.to_string());
            }
            body.declare(&t.elems[1]);
        }
        (_, true) => return Err("expected `(number, row)`".to_string()),
        (pat, false) => body.declare(pat),
    }
    body.visit_block(&f.body);
    if let Some(problem) = body.problem {
        return Err(problem);
    }
    // A head that changes its meaning between two loops would part lists that look alike.
    if let Some(name) = body.head_names.iter().find(|n| body.written.contains(*n)) {
        return Err(format!(
            "`{name}` is changed after it decided what is listed"
        ));
    }
    let mut lists: Vec<Pushed> = Vec::new();
    for push in body.pushes {
        match lists.iter_mut().find(|l| l.list == push.list) {
            Some(known) => {
                known.signature = format!("{}; {}", known.signature, push.signature);
                if known.index != push.index {
                    return Err(format!("`{}` lists rows and values", known.list));
                }
            }
            None => lists.push(push),
        }
    }
    Ok(lists)
}

/// Functions that only compute.
const PURE: &[&str] = &["Some", "from", "min", "max"];

struct Body<'p> {
    row: Option<String>,
    scopes: Vec<HashSet<String>>,
    /// Loops and conditions round where the visitor is.
    heads: Vec<String>,
    /// Variables in the heads of pushes.
    head_names: HashSet<String>,
    /// Variables of the body that are written once a push has been seen.
    written: HashSet<String>,
    pushes: Vec<Pushed>,
    plain: &'p dyn Fn(&str) -> bool,
    problem: Option<String>,
}

impl Body<'_> {
    fn declare(&mut self, pat: &syn::Pat) {
        struct Names<'s>(&'s mut HashSet<String>);
        impl<'a> Visit<'a> for Names<'_> {
            fn visit_pat_ident(&mut self, i: &'a syn::PatIdent) {
                self.0.insert(i.ident.to_string());
                visit::visit_pat_ident(self, i);
            }
        }
        if let Some(scope) = self.scopes.last_mut() {
            Names(scope).visit_pat(pat);
        }
    }

    fn local(&self, name: &str) -> bool {
        self.scopes.iter().any(|s| s.contains(name))
    }

    fn reject(&mut self, what: &impl quote::ToTokens, why: &str) {
        let what = text(what);
        self.problem
            .get_or_insert_with(|| format!("`{what}` {why}"));
    }

    fn write(&mut self, place: &syn::Expr, e: &syn::Expr) {
        match root(place) {
            Some(name) if self.local(&name) => {
                if !self.pushes.is_empty() || !self.heads.is_empty() {
                    self.written.insert(name);
                }
            }
            _ => self.reject(e, "carries something from row to row"),
        }
    }

    /// `list[i].push(x)` or `list.push(x)` on a list of the surrounding function.
    fn push(&mut self, m: &syn::ExprMethodCall) -> bool {
        let (list, index) = match &*m.receiver {
            syn::Expr::Index(i) => (&*i.expr, Some(&*i.index)),
            other => (other, None),
        };
        let (syn::Expr::Path(p), true, Some(value)) = (list, m.method == "push", m.args.first())
        else {
            return false;
        };
        let Some(list) = p
            .path
            .get_ident()
            .map(ToString::to_string)
            .filter(|n| !self.local(n))
        else {
            return false;
        };
        let row = matches!(uncast(value), syn::Expr::Path(p) if self.row.as_ref().is_some_and(|r| p.path.is_ident(r)));
        if !row {
            self.visit_expr(value);
        }
        if let Some(index) = index {
            self.visit_expr(index);
            self.names_of(index);
        }
        let place = index.map(|i| text(uncast(i))).unwrap_or_default();
        let signature = format!("{} [{place}]", self.heads.join(" / "));
        self.pushes.push(Pushed {
            list,
            signature,
            index: row,
        });
        true
    }

    /// Variables of the body that decide where and how often something is listed.
    fn names_of(&mut self, e: &syn::Expr) {
        struct Names(Vec<String>);
        impl<'a> Visit<'a> for Names {
            fn visit_expr_path(&mut self, p: &'a syn::ExprPath) {
                self.0.extend(p.path.get_ident().map(ToString::to_string));
            }
        }
        let mut names = Names(Vec::new());
        names.visit_expr(e);
        self.head_names.extend(names.0);
    }

    fn within(&mut self, head: Option<String>, f: impl FnOnce(&mut Self)) {
        let headed = head.is_some();
        self.heads.extend(head);
        self.scopes.push(HashSet::new());
        f(self);
        self.scopes.pop();
        if headed {
            self.heads.pop();
        }
    }
}

impl<'a> Visit<'a> for Body<'_> {
    fn visit_block(&mut self, b: &'a syn::Block) {
        self.within(None, |this| visit::visit_block(this, b));
    }

    fn visit_local(&mut self, l: &'a syn::Local) {
        if let Some(init) = &l.init {
            self.visit_expr(&init.expr);
            if init.diverge.is_some() {
                self.reject(l, "may leave the loop");
            }
        }
        self.declare(&l.pat);
    }

    fn visit_stmt_macro(&mut self, m: &'a syn::StmtMacro) {
        self.reject(m, "is a macro");
    }

    #[allow(clippy::too_many_lines, reason = "one arm for each kind of expression")]
    fn visit_expr(&mut self, e: &'a syn::Expr) {
        match e {
            syn::Expr::MethodCall(m) => {
                if self.push(m) {
                    return;
                }
                let name = m.method.to_string();
                let reads = matches!(root(&m.receiver), Some(r) if !self.local(&r));
                if reads {
                    self.reject(e, "reads or writes something outside of the loop");
                    return;
                }
                // `take(n)` is an iterator's.
                let takes = name == "take" && !m.args.is_empty();
                let changes = (super::number::WRITERS.contains(&name.as_str()) && !takes)
                    || name.starts_with("sort")
                    || name.ends_with("_mut")
                    || [
                        "pop", "remove", "retain", "truncate", "reverse", "drain", "swap", "dedup",
                        "fill", "next",
                    ]
                    .contains(&name.as_str());
                if changes && root(&m.receiver).is_some() {
                    self.write(&m.receiver, e);
                }
                visit::visit_expr(self, e);
            }
            syn::Expr::Assign(a) => {
                self.write(&a.left, e);
                self.visit_expr(&a.right);
            }
            syn::Expr::Binary(b) if super::number::is_assignment(&b.op) => {
                self.write(&b.left, e);
                self.visit_expr(&b.right);
            }
            syn::Expr::Reference(r) if r.mutability.is_some() => {
                self.write(&r.expr, e);
                self.visit_expr(&r.expr);
            }
            syn::Expr::Path(p) => {
                let Some(name) = p.path.get_ident().map(ToString::to_string) else {
                    return;
                };
                if self.row.as_deref() == Some(name.as_str()) {
                    self.reject(e, "depends on how many rows come before");
                } else if !self.local(&name) && !(self.plain)(&name) {
                    self.reject(e, "comes from outside of the loop");
                }
            }
            syn::Expr::Field(f) => {
                // A number of the model.
                if root(e).as_deref() != Some("self") {
                    self.visit_expr(&f.base);
                }
            }
            syn::Expr::Call(c) => {
                let pure = matches!(&*c.func, syn::Expr::Path(p) if p.path.segments.last().is_some_and(|s| PURE.contains(&s.ident.to_string().as_str())));
                if !pure {
                    self.reject(e, "calls a function");
                }
                c.args.iter().for_each(|a| self.visit_expr(a));
            }
            syn::Expr::ForLoop(l) => {
                self.visit_expr(&l.expr);
                self.names_of(&l.expr);
                let head = format!("for {} in {}", text(&l.pat), text(&l.expr));
                self.within(Some(head), |this| {
                    this.declare(&l.pat);
                    this.visit_block(&l.body);
                });
            }
            syn::Expr::If(i) => {
                let cond = text(&i.cond);
                self.names_of(&i.cond);
                self.within(Some(format!("if {cond}")), |this| {
                    this.visit_expr(&i.cond);
                    this.visit_block(&i.then_branch);
                });
                if let Some((_, other)) = &i.else_branch {
                    self.within(Some(format!("if not {cond}")), |this| {
                        this.visit_expr(other);
                    });
                }
            }
            syn::Expr::Let(l) => {
                self.visit_expr(&l.expr);
                self.declare(&l.pat);
            }
            syn::Expr::Match(m) => {
                self.visit_expr(&m.expr);
                self.names_of(&m.expr);
                for arm in &m.arms {
                    let head = format!("match {} {}", text(&m.expr), text(&arm.pat));
                    self.within(Some(head), |this| {
                        this.declare(&arm.pat);
                        this.visit_expr(&arm.body);
                    });
                }
            }
            syn::Expr::Closure(c) => self.within(None, |this| {
                c.inputs.iter().for_each(|p| this.declare(p));
                this.visit_expr(&c.body);
            }),
            syn::Expr::Return(_)
            | syn::Expr::Break(_)
            | syn::Expr::Continue(_)
            | syn::Expr::Try(_)
            | syn::Expr::While(_)
            | syn::Expr::Loop(_)
            | syn::Expr::Macro(_)
            | syn::Expr::Unsafe(_)
            | syn::Expr::Async(_)
            | syn::Expr::Await(_) => self.reject(e, "cannot be followed in a loop over rows"),
            _ => visit::visit_expr(self, e),
        }
    }
}

/// The variable that an expression reaches into.
pub(crate) fn root(e: &syn::Expr) -> Option<String> {
    match e {
        syn::Expr::Path(p) => p.path.get_ident().map(ToString::to_string),
        syn::Expr::Index(i) => root(&i.expr),
        syn::Expr::Field(f) => root(&f.base),
        syn::Expr::MethodCall(m) => root(&m.receiver),
        syn::Expr::Paren(p) => root(&p.expr),
        syn::Expr::Reference(r) => root(&r.expr),
        syn::Expr::Unary(u) => root(&u.expr),
        _ => None,
    }
}

fn uncast(e: &syn::Expr) -> &syn::Expr {
    match e {
        syn::Expr::Cast(c) => uncast(&c.expr),
        syn::Expr::Paren(p) => uncast(&p.expr),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> Result<Vec<Pushed>, String> {
        let f: syn::ExprForLoop = syn::parse_str(&format!(
            "for (i, row) in rows.iter().enumerate() {{ {body} }}"
        ))
        .expect("a loop");
        row_loop(&f, true, &|name| name == "k")
    }

    #[test]
    fn lists_of_one_router_have_one_order() {
        let lists = read(
            "let mut order = (0..row.len()).collect::<Vec<_>>(); order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
             let mut sum = 0f32;
             for &e in order.iter().take(k) { sum += row[e]; top[e].push(i as u32); }
             for &e in order.iter().take(k) { weights[e].push(row[e] / sum); }",
        )
        .expect("a loop over rows");
        assert_eq!(lists.len(), 2);
        assert_eq!(lists[0].signature, lists[1].signature);
        assert!(lists[0].index && !lists[1].index);
    }

    #[test]
    fn what_depends_on_other_rows_is_refused() {
        for body in [
            "if i > 3 { top.push(i) }",
            "if top[0].len() < 4 { top[0].push(i) }",
            "count += 1; top.push(i)",
            "top.push(i); other.clear()",
            "if row[0] > best { top.push(i) }",
            "top.push(i); if row[0] > 0.0 { break; }",
            "top.push(rows[i])",
            "seen(row); top.push(i)",
        ] {
            assert!(read(body).is_err(), "{body}");
        }
    }

    #[test]
    fn lists_of_another_order_are_told_apart() {
        let lists = read(
            "for e in row { top.push(i); } for e in row { if *e > 0.0 { weights.push(*e); } }",
        )
        .expect("a loop over rows");
        assert_ne!(lists[0].signature, lists[1].signature);
        assert!(read("let mut n = row.clone(); for e in n.iter() { top.push(i); } n.pop(); for e in n.iter() { w.push(*e); }").is_err());
    }
}
