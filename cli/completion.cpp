// Completion scripts for shells, made from the command line's own definition, so that they cannot fall behind it.
#include <map>

#include <fmt/ranges.h>
#include <CLI/CLI.hpp>

#include "cli/command.h"
#include "cli/output.h"

namespace moraine::cli {
namespace {

struct Command {
  std::string name, summary;
  std::vector<std::string> options;
  std::map<std::string, std::vector<std::string>> choices;  // option, or "" for the first argument -> values
};

// CLI11 shows a fixed set of values as {a,b}.
std::vector<std::string> choices_of(const CLI::Option& option) {
  const std::string type = option.get_type_name();
  const size_t open = type.find('{'), close = type.find('}');
  std::vector<std::string> values;
  if (open == std::string::npos || close == std::string::npos) return values;
  for (size_t start = open + 1; start < close;) {
    const size_t end = std::min(type.find(',', start), close);
    values.push_back(type.substr(start, end - start));
    start = end + 1;
  }
  return values;
}

std::vector<Command> commands_of(const CLI::App& app) {
  std::vector<Command> commands;
  for (const CLI::App* sub : app.get_subcommands([](const CLI::App*) { return true; })) {
    Command command{sub->get_name(), sub->get_description(), {}, {}};
    for (const CLI::Option* option : sub->get_options()) {
      const auto values = choices_of(*option);
      if (option->get_positional() && !values.empty()) command.choices[""] = values;
      for (const auto& name : option->get_lnames()) {
        command.options.push_back("--" + name);
        if (!values.empty()) command.choices["--" + name] = values;
      }
    }
    commands.push_back(std::move(command));
  }
  Command help{"help", "Explains a command", {}, {}};
  for (const auto& command : commands) help.choices[""].push_back(command.name);
  commands.push_back(std::move(help));
  return commands;
}

std::string bash(const std::vector<Command>& commands) {
  std::vector<std::string> names;
  std::string values, words;
  for (const auto& command : commands) {
    names.push_back(command.name);
    for (const auto& [option, list] : command.choices)
      if (!option.empty())
        values += fmt::format("    {}/{}) COMPREPLY=($(compgen -W \"{}\" -- \"$current\")); return ;;\n", command.name,
                              option, fmt::join(list, " "));
    const auto first = command.choices.find("");
    const std::string arguments =
        first == command.choices.end() ? "" : fmt::format("{}", fmt::join(first->second, " "));
    words += fmt::format("    {}) options=\"{}\" arguments=\"{}\" ;;\n", command.name, fmt::join(command.options, " "),
                         arguments);
  }
  return fmt::format(
      R"(# bash completion of moraine: source this file, or put it into ~/.local/share/bash-completion/completions/moraine
_moraine() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} command="" options="" arguments="" i
  COMPREPLY=()
  for ((i = 1; i < COMP_CWORD; i++)); do
    [[ ${{COMP_WORDS[i]}} == -* ]] || {{ command=${{COMP_WORDS[i]}}; break; }}
  done
  case $command/$previous in
{}  esac
  case $command in
    "") options="--help --help-all --verbose --version" arguments="{}" ;;
{}  esac
  [[ $current == -* ]] && arguments=$options
  COMPREPLY=($(compgen -W "$arguments" -- "$current"))
}}
complete -o default -F _moraine moraine
)",
      values, fmt::join(names, " "), words);
}

std::string fish(const std::vector<Command>& commands) {
  const auto quoted = [](std::string text) {
    for (size_t at = 0; (at = text.find('\'', at)) != std::string::npos; at += 2) text.insert(at, "\\");
    return "'" + text + "'";
  };
  std::string out = "# fish completion of moraine: put this file into ~/.config/fish/completions/moraine.fish\n";
  for (const auto& command : commands) {
    out += fmt::format("complete -c moraine -n __fish_use_subcommand -f -a {} -d {}\n", command.name,
                       quoted(command.summary));
    for (const auto& option : command.options) {
      const auto values = command.choices.find(option);
      out +=
          fmt::format("complete -c moraine -n '__fish_seen_subcommand_from {}' -l {}", command.name, option.substr(2));
      out += values == command.choices.end() ? "\n" : fmt::format(" -x -a '{}'\n", fmt::join(values->second, " "));
    }
    if (const auto first = command.choices.find(""); first != command.choices.end())
      out += fmt::format("complete -c moraine -n '__fish_seen_subcommand_from {}' -f -a '{}'\n", command.name,
                         fmt::join(first->second, " "));
  }
  return out;
}

}  // namespace

void add_completion(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("completion", "Prints a completion script for a shell");
  auto shell = std::make_shared<std::string>();
  command->add_option("shell", *shell, "bash | zsh | fish")->required()->check(CLI::IsMember({"bash", "zsh", "fish"}));
  command->footer(
      "Examples: source <(moraine completion bash)\n          moraine completion fish > "
      "~/.config/fish/completions/moraine.fish");
  command->callback([=, &app, &exit_code] {
    const auto commands = commands_of(app);
    std::string text = *shell == "fish" ? fish(commands) : bash(commands);
    if (*shell == "zsh")
      text = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n" + text;
    print(text);
    exit_code = 0;
  });
}

}  // namespace moraine::cli
