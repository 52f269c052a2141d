(ns palyra.check
  "Reads the EDN that `jepsen run` leaves in a run's folder, and asks knossos and elle what they think of it.

  Each register has a file of its own, independent/KEY/history.edn, with bare values: that is what knossos' models want.
  For elle the same operations become transactions: a read, a write, or (a cas) a read and then a write. It tells
  versions apart by their values."
  (:require [clojure.edn :as edn]
            [clojure.java.io :as io]
            [clojure.pprint :refer [pprint]]
            [elle.rw-register :as rw]
            [jepsen.history :as h]
            [knossos.competition :as competition]
            [knossos.model :as model])
  (:import (java.io PushbackReader))
  (:gen-class))

(defn ops
  "All op maps of a file."
  [file]
  (with-open [in (PushbackReader. (io/reader file))]
    (->> (repeatedly #(edn/read {:eof ::end} in))
         (take-while #(not= ::end %))
         vec)))

(defn registers
  "The files of single registers, by key."
  [run]
  (for [folder (sort (.listFiles (io/file run "independent")))
        :let [file (io/file folder "history.edn")]
        :when (.exists file)]
    [(.getName folder) file]))

(defn named
  "The op with :absent for what we write as nil, a register that is not there. Knossos takes a read of nil for one whose
  answer nobody knows, and that agrees with every state; only reads that did not succeed may stay so."
  [{:keys [f type] :as op}]
  (let [value #(if (nil? %) :absent %)]
    (cond (= :cas f)                     (update op :value #(mapv value %))
          (or (= :write f) (= :ok type)) (update op :value value)
          :else                          op)))

(defn linearizable
  "What knossos says of one register: {:valid? true, false or :unknown}. It gives up after so many seconds."
  [file seconds]
  (let [result (competition/analysis (model/cas-register :absent)
                                     (h/history (mapv named (ops file)))
                                     {:time-limit (* 1000 seconds)})]
    (cond-> (select-keys result [:valid? :cause :op :final-paths])
      (:final-paths result) (update :final-paths #(take 3 %)))))

(defn micro-ops
  "What elle calls a transaction. A cas that took effect read what it expected; of others elle believes no read."
  [k {:keys [f value]}]
  (case f
    :read  [[:r k value]]
    :write [[:w k value]]
    :cas   (let [[from to] value] [[:r k from] [:w k to]])))

(defn told-apart?
  "Is every version of this register known by its value? Not if a value was written twice, nor after a deletion."
  [ops]
  (let [written (for [{:keys [f type value]} ops
                      :when (and (= :invoke type) (not= :read f))]
                  (if (= :cas f) (second value) value))]
    (or (empty? written)
        (and (not-any? nil? written) (apply distinct? written)))))

(defn acyclic
  "What elle says of one register, or nil if its versions cannot be told apart. Each operation is of one register, so if
  every register is strictly serializable by itself, all together are. Elle is not asked about all at once: it then
  infers orders of versions from operations of other registers, and calls histories cyclic that are not."
  [k file]
  (let [all (ops file)]
    (when (told-apart? all)
      (-> {:linearizable-keys? true, :wfr-keys? true, :consistency-models [:strict-serializable]}
          (rw/check (h/history (mapv #(assoc % :f :txn, :value (micro-ops k %)) all)))
          (select-keys [:valid? :anomaly-types :anomalies :not])))))

(defn verdict
  "Of all verdicts the worst. Nothing judged is nothing known."
  [results]
  (let [verdicts (set (map :valid? results))]
    (cond (contains? verdicts false) false
          (= #{true} verdicts)       true
          :else                      :unknown)))

(defn judged
  "What this checker says of each register of a run."
  [run checker check]
  (into (sorted-map)
        (for [[k file] (registers run)
              :let [result (check k file)]]
          (do (println checker k (if result (:valid? result) "left out"))
              [k result]))))

(defn -main
  "lein run RUN-FOLDER [both|knossos|elle [SECONDS-PER-REGISTER]]"
  [run & [which seconds]]
  (let [seconds (Long/parseLong (or seconds "60"))
        knossos (when-not (= which "elle")
                  (judged run "knossos:" (fn [_ file] (linearizable file seconds))))
        elle    (when-not (= which "knossos")
                  (judged run "elle:" acyclic))
        valid?  (verdict (remove nil? (concat (vals knossos) (vals elle))))]
    (pprint {:valid? valid?, :knossos knossos, :elle elle})
    (shutdown-agents)
    (System/exit (case valid? true 0, false 1, 2))))
