# As much of nixpkgs' lib as the modules in docs/examples/nix use: what a module makes of a configuration, merged.
{ module, given }:

let
  inherit (builtins) attrNames concatMap elem foldl' isAttrs isList listToAttrs mapAttrs;

  isOption = value: isAttrs value && value ? isOption;
  merge = a: b:
    if isAttrs a && isAttrs b then
      listToAttrs (map
        (name: {
          inherit name;
          value = if a ? ${name} && b ? ${name} then merge a.${name} b.${name} else b.${name} or a.${name};
        })
        (attrNames (a // b)))
    else if isList a && isList b then a ++ b
    else b;

  lib = {
    mkOption = option: option // { isOption = true; };
    mkEnableOption = _: { isOption = true; default = false; };
    mkIf = condition: value: if condition then value else { };
    mkMerge = foldl' merge { };
    mapAttrs' = f: set: listToAttrs (map (name: f name set.${name}) (attrNames set));
    nameValuePair = name: value: { inherit name value; };
    types = {
      attrsOf = _: null;
      listOf = _: null;
      submodule = _: null;
      anything = null;
      bool = null;
      package = null;
      str = null;
    };
  };

  pkgs = {
    coreutils = "/usr";
    fuse3 = "/usr";
    formats.toml = _: { generate = name: settings: "/etc/${name}"; };
  };

  defaults = options:
    listToAttrs (concatMap
      (name:
        let value = options.${name}; in
        if isOption value then (if value ? default then [{ inherit name; value = value.default; }] else [ ])
        else [{ inherit name; value = defaults value; }])
      (attrNames options));

  # An option that is given and not declared is a mistake, as in the real thing.
  unknown = options: values:
    concatMap
      (name:
        if !(options ? ${name}) then [ name ]
        else if isOption options.${name} then [ ]
        else unknown options.${name} values.${name})
      (attrNames values);

  evaluated = import module {
    inherit lib pkgs;
    config = merge (defaults evaluated.options) given;
  };
in
if unknown evaluated.options given != [ ] then throw "unknown options: ${toString (unknown evaluated.options given)}"
else evaluated.config
